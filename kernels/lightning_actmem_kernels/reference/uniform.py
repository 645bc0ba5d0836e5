"""Per-group min-max quantisation to 2**bits evenly spaced levels.

For a group x with minimum lo (rounded down to bfloat16) and step = (max - lo) / (2**bits - 1) (rounded up):
    encode: q = floor((x - lo) / step + u)
    decode: (q + 1/2 - u) * step + lo   (dither)   or   q * step + lo   (stochastic, nearest)
with u from the counter (see noise.py), or u = 1/2 for nearest. A group that holds NaN or inf, or whose step
would exceed 2**126, decodes to NaN throughout, so that a loss scaler still sees it. Within half a step of the largest
float32 a value may come back as inf; float16, whose range is narrow, saturates instead.

Source of the dither: Roberts, "Picture coding using pseudo-random noise", IRE Trans. Inf. Theory, 1962.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import uniform_noise
from .bf16 import HIGH_HALF, LOW_HALF, inverse, round_down, step_bits
from .bits import pack, unpack
from .chunks import group_chunks, group_count, load_groups, store_groups


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """Quantise a flat tensor.

    Args:
        flat: 1-D contiguous float32, bfloat16 or float16, n elements in N = ceil(n / G) groups.
        bits: Bits per code b.
        group_size: Elements per group G.
        rounding: `dither`, `stochastic` or `nearest`.
        key: 64-bit key of the noise stream.

    Returns:
        Codes, uint8 [N, b, G/8], and grids, int32 [N]: bfloat16 step in the high half, bfloat16 minimum in the low.
    """
    groups = group_count(flat.numel(), group_size)
    codes = torch.empty(groups, bits, group_size // 8, dtype=torch.uint8, device=flat.device)
    grids = torch.empty(groups, dtype=torch.int32, device=flat.device)
    for first, last in group_chunks(flat.numel(), group_size, flat.device):
        x = load_groups(flat, first, last, group_size)
        grids[first:last] = _grid(x, bits)
        step, lo = _step_and_minimum(grids[first:last])
        v = (x - lo).mul_(inverse(step))
        if rounding == "nearest":
            v.add_(0.5)
        else:
            v.add_(uniform_noise(key, first, last - first, group_size, flat.device))
        # v >= 0, so truncation is floor. It stays below 2**bits without a clamp: v - u exceeds the top level by at most
        # three roundings (5e-5), and u <= 1 - 1/512. In a group without a grid v is u or NaN, and the low byte of NaN
        # cast to int32 is 0.
        pack(v.to(torch.int32).to(torch.uint8), bits, codes[first:last])
    return codes, grids


def decode(codes: Tensor, grids: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Restore what `encode` packed.

    Args:
        codes: uint8 [N, b, G/8].
        grids: int32 [N].
        bits: Bits per code b.
        rounding: As given to `encode`.
        key: As given to `encode`.
        numel: Elements n.
        dtype: float32, bfloat16 or float16.

    Returns:
        1-D tensor of n elements.
    """
    group_size = 8 * codes.shape[2]
    flat = torch.empty(numel, dtype=dtype, device=codes.device)
    for first, last in group_chunks(numel, group_size, codes.device):
        step, lo = _step_and_minimum(grids[first:last])
        q = unpack(codes[first:last], bits).to(torch.float32)
        if rounding == "dither":
            q.add_(0.5).sub_(uniform_noise(key, first, last - first, group_size, codes.device))
        store_groups(q.mul_(step).add_(lo), flat, first)
    return flat


def _grid(x: Tensor, bits: int) -> Tensor:
    lo_bits = round_down(x.amin(1))
    step = step_bits(x.amax(1) - lo_bits.view(torch.float32), (1 << bits) - 1)
    lo_bits = torch.where(step.view(torch.float32).isnan(), 0, lo_bits)
    return step | (lo_bits >> 16) & LOW_HALF


def _step_and_minimum(grids: Tensor) -> tuple[Tensor, Tensor]:
    """Both float32 [R, 1]."""
    column = grids.unsqueeze(1)
    return (column & HIGH_HALF).view(torch.float32), (column << 16).view(torch.float32)
