"""Quantisation of non-negative tensors that keeps zeros exactly zero and positive values positive.

For ReLU outputs: backward reads their sign, so a value that crosses zero is not a small error but a wrong gradient.
Level 0 means x <= 0. With M the group maximum and step = M / (2**bits - 2) rounded up to bfloat16, for x > 0:
    encode: v = 256 x / step rounded to nearest;  q = 1 + floor((v + r) / 256)
    decode: max((256 q + 255 - r) * (step / 256) - 383.5 step / 256, floor)   (dither)
            max((q - 1) * step, floor)   (stochastic, nearest)
with the byte r from the counter (see noise.py), or r = 128 for nearest, and floor = max(step / 32, smallest normal
number of the dtype) so that no cast can return to zero. A group that holds NaN or inf decodes to NaN throughout; at the
ends of the floating-point range it does as uniform.py does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import noise_of
from .bf16 import inverse, step_bits
from .bits import pack, unpack
from .chunks import store
from .grouped import MAGIC, decode_by_chunk, empty_codes, encode_by_chunk, rounded


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
    codes = empty_codes(flat, bits, group_size)
    steps = codes.new_empty(len(codes), dtype=torch.int16)
    encode_by_chunk(encode_groups, (bits, rounding), flat, group_size, key, (codes, steps))
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
    return decode_by_chunk(decode_groups, (bits, rounding), (codes, steps), key, numel, dtype)


def encode_groups(x: Tensor, words: Tensor, bits: int, rounding: str) -> tuple[Tensor, Tensor]:
    """Codes and steps of groups x [R, G], which is not written to, with the words of `group_words`."""
    x = x.to(torch.float32)
    steps = (_step_bits(x, bits) >> 16).to(torch.int16)
    step = _step(steps)
    # As in uniform.py. Positive values take the magic number of level 1, and zero stays below it whatever the noise.
    v = (x * inverse(step).mul_(256.0)).add_(MAGIC + 256.0)
    v = torch.where(x > 0, v, MAGIC)
    codes = pack(rounded(v, words, rounding), bits)
    # A group without a step stores zeros.
    return codes.mul_((step == step).unsqueeze(2)), steps


def decode_groups(codes: Tensor, steps: Tensor, words: Tensor, out: Tensor, bits: int, rounding: str) -> None:
    """Write the values of what `encode_groups` returned to `out` [R, G]."""
    step = _step(steps)
    fine = step * (1 / 256)
    q = unpack(codes, bits)
    value = q.to(torch.float32).mul_(256.0)
    if rounding == "dither":
        value.add_(noise_of(words, out.shape[1]).bitwise_not_()).mul_(fine).add_(fine * -383.5)
    else:
        value.mul_(fine).sub_(step)
    value = torch.maximum(value, (step / 32).clamp_min_(torch.finfo(out.dtype).tiny))
    # A product with 0 or 1 keeps the NaN of a group without a step, and is 7 times faster than torch.where.
    store(value.mul_(q.clamp_(max=1).to(torch.float32)), out)


def _step_bits(x: Tensor, bits: int) -> Tensor:
    # The minimum matters only when it is -inf: then the span is infinite.
    span = torch.where(x.amin(1) == -torch.inf, torch.inf, x.amax(1).clamp_min_(0.0))
    return step_bits(span, (1 << bits) - 2)


def _step(steps: Tensor) -> Tensor:
    """float32 [R, 1]."""
    return (steps.to(torch.int32) << 16).view(torch.float32).unsqueeze(1)
