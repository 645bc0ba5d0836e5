"""Per-group min-max quantisation to 2**bits evenly spaced levels.

For a group x with minimum lo (rounded down to bfloat16) and step = (max - lo) / (2**bits - 1) (rounded up):
    encode: v = 256 (x - lo) / step rounded to nearest;  q = floor((v + r) / 256)
    decode: (256 q + 255 - r) * (step / 256) + (lo - 127.5 step / 256)   (dither)   or   q * step + lo   (the others)
with the byte r from the counter (see noise.py), or r = 128 for nearest. A group that holds NaN or inf, or whose step
would exceed 2**126, decodes to NaN throughout, so that a loss scaler still sees it. Within half a step of the largest
float32 a value may come back as inf; float16, whose range is narrow, saturates instead.

Source of the dither: Roberts, "Picture coding using pseudo-random noise", IRE Trans. Inf. Theory, 1962.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import noise_of
from .bf16 import HIGH_HALF, LOW_HALF, inverse, round_down, step_bits
from .bits import pack, unpack
from .chunks import store
from .grouped import MAGIC, decode_by_chunk, empty_codes, encode_by_chunk, rounded


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
    codes = empty_codes(flat, bits, group_size)
    grids = codes.new_empty(len(codes), dtype=torch.int32)
    encode_by_chunk(encode_groups, (bits, rounding), flat, group_size, key, (codes, grids))
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
    return decode_by_chunk(decode_groups, (bits, rounding), (codes, grids), key, numel, dtype)


def encode_groups(x: Tensor, words: Tensor, bits: int, rounding: str) -> tuple[Tensor, Tensor]:
    """Codes and grids of groups x [R, G], which is not written to, with the words of `group_words`."""
    x = x.to(torch.float32)
    grids = _grid(x, bits)
    step, lo = _step_and_minimum(grids)
    # No clamp is needed: four roundings at most take v above the top level (by 0.03), which the rounding to nearest
    # takes back, so v + r < 256 * 2**bits.
    v = (x - lo).mul_(inverse(step).mul_(256.0)).add_(MAGIC)
    codes = pack(rounded(v, words, rounding), bits)
    # A group without a grid stores zeros.
    return codes.mul_((step == step).unsqueeze(2)), grids


def decode_groups(codes: Tensor, grids: Tensor, words: Tensor, out: Tensor, bits: int, rounding: str) -> None:
    """Write the values of what `encode_groups` returned to `out` [R, G]."""
    step, lo = _step_and_minimum(grids)
    q = unpack(codes, bits).to(torch.float32)
    if rounding == "dither":
        fine = step * (1 / 256)
        q.mul_(256.0).add_(noise_of(words, out.shape[1]).bitwise_not_()).mul_(fine).add_(lo - fine * 127.5)
    else:
        q.mul_(step).add_(lo)
    store(q, out)


def _grid(x: Tensor, bits: int) -> Tensor:
    lo_bits = round_down(x.amin(1))
    step = step_bits(x.amax(1) - lo_bits.view(torch.float32), (1 << bits) - 1)
    lo_bits = torch.where(step.view(torch.float32).isnan(), 0, lo_bits)
    return step | (lo_bits >> 16) & LOW_HALF


def _step_and_minimum(grids: Tensor) -> tuple[Tensor, Tensor]:
    """Both float32 [R, 1]."""
    column = grids.unsqueeze(1)
    return (column & HIGH_HALF).view(torch.float32), (column << 16).view(torch.float32)
