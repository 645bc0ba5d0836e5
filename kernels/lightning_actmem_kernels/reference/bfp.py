"""Block floating point: signed mantissas of a few bits under one power of two per group.

With L = 2**(bits - 1) - 1 and step the smallest power of two with |x| <= L * step throughout the group:
    encode: v = 256 x / step rounded to nearest;  q = floor((v + r) / 256), from -L to L, stored as q + L
    decode: (256 q + 127.5 - r) * step / 256   (dither)   or   q * step   (stochastic, nearest)
with the byte r from the counter (see noise.py), or r = 128 for nearest. Scaling is exact, so that nothing but the
rounding to q is inexact: zeros come back as zeros where the whole group is zero or the rounding is not `dither`, and so
does every multiple of step. The exponent of step is a byte (exponent.py): below 2**-118 steps stay there. A group that
holds NaN or inf, or whose step would exceed 2**126, decodes to NaN throughout.

Source: Drumond et al., "Training DNNs with hybrid block floating point", NeurIPS 2018, with its stochastic rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import noise_of
from .bits import pack, unpack
from .chunks import store
from .exponent import NO_SCALE, exponent_bytes, inverse, scale
from .grouped import MAGIC, decode_by_chunk, empty_codes, encode_by_chunk, rounded


def largest_mantissa(bits: int) -> int:
    """L, the largest magnitude of a mantissa; the lowest two's complement code is left out, for symmetry."""
    return (1 << bits - 1) - 1


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """Quantise a flat tensor.

    Args:
        flat: 1-D contiguous float32, bfloat16 or float16, n elements in N = ceil(n / G) groups.
        bits: Bits per code b, at least 2.
        group_size: Elements per group G.
        rounding: `dither`, `stochastic` or `nearest`.
        key: 64-bit key of the noise stream.

    Returns:
        Codes, uint8 [N, b, G/8], and exponents, uint8 [N].
    """
    codes = empty_codes(flat, bits, group_size)
    exponents = codes.new_empty(len(codes))
    encode_by_chunk(encode_groups, (bits, rounding), flat, group_size, key, (codes, exponents))
    return codes, exponents


def decode(
    codes: Tensor, exponents: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """Restore what `encode` packed.

    Args:
        codes: uint8 [N, b, G/8].
        exponents: uint8 [N].
        bits: Bits per code b.
        rounding: As given to `encode`.
        key: As given to `encode`.
        numel: Elements n.
        dtype: float32, bfloat16 or float16.

    Returns:
        1-D tensor of n elements.
    """
    return decode_by_chunk(decode_groups, (bits, rounding), (codes, exponents), key, numel, dtype)


def encode_groups(x: Tensor, words: Tensor, bits: int, rounding: str) -> tuple[Tensor, Tensor]:
    """Codes and exponents of groups x [R, G], which is not written to, with the words of `group_words`."""
    x = x.to(torch.float32)
    top = largest_mantissa(bits)
    exponents = exponent_bytes(x, top)
    # v + 256 L is not negative; the product is exact.
    v = (x * inverse(exponents, 8)).add_(MAGIC + 256 * top)
    codes = pack(rounded(v, words, rounding), bits)
    # A group without a step stores zeros.
    return codes.mul_((exponents < NO_SCALE).view(-1, 1, 1)), exponents


def decode_groups(codes: Tensor, exponents: Tensor, words: Tensor, out: Tensor, bits: int, rounding: str) -> None:
    """Write the values of what `encode_groups` returned to `out` [R, G]."""
    top = largest_mantissa(bits)
    q = unpack(codes, bits).to(torch.float32)
    if rounding == "dither":
        fine = scale(exponents, -8)
        q.sub_(top).mul_(256.0).add_(noise_of(words, out.shape[1]).bitwise_not_())
        # 0 - ..., so that a group of zeros comes back without signs.
        q.mul_(fine).add_(0.0 - fine * 127.5)
    else:
        q.sub_(top).mul_(scale(exponents))
    store(q, out)
