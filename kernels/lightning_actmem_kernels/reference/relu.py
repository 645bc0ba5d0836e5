"""Quantisation of non-negative tensors that keeps zeros exactly zero and positive values positive.

For ReLU outputs: backward reads their sign, so a value that crosses zero is not a small error but a wrong gradient.
Level 0 means x <= 0. With M the group maximum and step = M / (2**bits - 2) rounded up to bfloat16, for x > 0:
    encode: q = 1 + floor(x / step + u)
    decode: max((q - 1 + 1/2 - u) * step, floor)   (dither)   or   max((q - 1) * step, floor)   (stochastic, nearest)
with floor = max(step / 32, smallest normal number of the dtype) so that no cast can return to zero. A group that holds
NaN or inf decodes to NaN throughout; at the ends of the floating-point range it does as uniform.py does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import uniform_noise
from .bf16 import inverse, step_bits
from .bits import pack, unpack
from .chunks import group_chunks, group_count, load_groups, store_groups


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """Quantise a flat tensor of non-negative values.

    Args:
        flat: 1-D contiguous float32, bfloat16 or float16, n elements in N = ceil(n / G) groups.
        bits: Bits per code b, at least 2.
        group_size: Elements per group G.
        rounding: `dither`, `stochastic` or `nearest`.
        key: 64-bit key of the noise stream.

    Returns:
        Codes, uint8 [N, b, G/8], and steps, int16 [N]: the bits of a bfloat16.
    """
    groups = group_count(flat.numel(), group_size)
    codes = torch.empty(groups, bits, group_size // 8, dtype=torch.uint8, device=flat.device)
    steps = torch.empty(groups, dtype=torch.int16, device=flat.device)
    for first, last in group_chunks(flat.numel(), group_size, flat.device):
        x = load_groups(flat, first, last, group_size)
        steps[first:last] = _step_bits(x, bits) >> 16
        step = _step(steps[first:last])
        v = x * inverse(step)
        if rounding == "nearest":
            v.add_(0.5)
        else:
            v.add_(uniform_noise(key, first, last - first, group_size, flat.device))
        # Level 2**bits - 2 plus one at most, without a clamp, as in uniform.py.
        q = v.to(torch.int32).to(torch.uint8).add_(1).mul_(x > 0)
        # A group without a step stores zeros.
        codes[first:last] = pack(q, bits).mul_((step == step).unsqueeze(2))
    return codes, steps


def decode(codes: Tensor, steps: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Restore what `encode` packed.

    Args:
        codes: uint8 [N, b, G/8].
        steps: int16 [N].
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
        step = _step(steps[first:last])
        q = unpack(codes[first:last], bits)
        value = q.to(torch.float32)
        if rounding == "dither":
            value.sub_(0.5).sub_(uniform_noise(key, first, last - first, group_size, codes.device))
        else:
            value.sub_(1.0)
        value = torch.maximum(value.mul_(step), (step / 32).clamp_min_(torch.finfo(dtype).tiny))
        # A product with 0 or 1 keeps the NaN of a group without a step, and is 7 times faster than torch.where.
        store_groups(value.mul_(q.clamp_(max=1).to(torch.float32)), flat, first)
    return flat


def _step_bits(x: Tensor, bits: int) -> Tensor:
    # The minimum matters only when it is -inf: then the span is infinite.
    span = torch.where(x.amin(1) == -torch.inf, torch.inf, x.amax(1).clamp_min_(0.0))
    return step_bits(span, (1 << bits) - 2)


def _step(steps: Tensor) -> Tensor:
    """float32 [R, 1]."""
    return (steps.to(torch.int32) << 16).view(torch.float32).unsqueeze(1)
