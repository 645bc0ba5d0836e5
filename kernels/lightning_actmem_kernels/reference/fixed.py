"""Quantisation to 2**bits evenly spaced levels of a range that is known beforehand: no metadata.

For derivatives of bounded functions: that of GELU lies in [-0.129, 1.129] whatever goes in. With low and high rounded
to float32 and step = (high - low) / (2**bits - 1), for x clamped to the range:
    encode: v = 256 (x - low) / step rounded to nearest;  q = floor((v + r) / 256)
    decode: (256 q + 255 - r) * (step / 256) + (low - 127.5 step / 256)   (dither)   or   q * step + low   (the others)
with the byte r from the counter (see noise.py), or r = 128 for nearest. There is no room for NaN: it comes back as low.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import noise_of
from .bits import pack, unpack
from .chunks import store
from .grouped import MAGIC, decode_by_chunk, empty_codes, encode_by_chunk, rounded


class Grid(NamedTuple):
    """The numbers of a range at a width, each a float32: the backends must not round them in their own ways.

    Args:
        low: Lowest level.
        high: Highest level.
        scale: 256 / step.
        factor: What a decoded number is multiplied by.
        offset: What is added then.
    """

    low: float
    high: float
    scale: float
    factor: float
    offset: float

    @staticmethod
    @lru_cache
    def of(low: float, high: float, bits: int, rounding: str) -> Grid:
        """The grid of 2**bits levels from low to high."""
        low, high = _float32(low), _float32(high)
        step = (high - low) / ((1 << bits) - 1)
        factor = _float32(step / 256 if rounding == "dither" else step)
        offset = _float32(low - 127.5 * step / 256) if rounding == "dither" else low
        return Grid(low, high, _float32(256 / step), factor, offset)


def encode(flat: Tensor, bits: int, group_size: int, low: float, high: float, rounding: str, key: int) -> Tensor:
    """Quantise a flat tensor.

    Args:
        flat: 1-D contiguous float32, bfloat16 or float16, n elements in N = ceil(n / G) groups.
        bits: Bits per code b.
        group_size: Elements per group G: of the code layout and the noise.
        low: Lowest level.
        high: Highest level.
        rounding: `dither`, `stochastic` or `nearest`.
        key: 64-bit key of the noise stream.

    Returns:
        Codes, uint8 [N, b, G/8].
    """
    codes = empty_codes(flat, bits, group_size)
    constants = (Grid.of(low, high, bits, rounding), bits, rounding)
    encode_by_chunk(encode_groups, constants, flat, group_size, key, (codes,))
    return codes


def decode(
    codes: Tensor, bits: int, low: float, high: float, rounding: str, key: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """Restore what `encode` packed.

    Args:
        codes: uint8 [N, b, G/8].
        bits: Bits per code b.
        low: As given to `encode`.
        high: As given to `encode`.
        rounding: As given to `encode`.
        key: As given to `encode`.
        numel: Elements n.
        dtype: float32, bfloat16 or float16.

    Returns:
        1-D tensor of n elements.
    """
    constants = (Grid.of(low, high, bits, rounding), bits, rounding)
    return decode_by_chunk(decode_groups, constants, (codes,), key, numel, dtype)


def encode_groups(x: Tensor, words: Tensor, grid: Grid, bits: int, rounding: str) -> tuple[Tensor]:
    """Codes of groups x [R, G], which is not written to, with the words of `group_words`."""
    x = x.to(torch.float32)
    # NaN is not above low. At high, v is 256 times the top level exactly, once rounded to an integer.
    x = torch.where(x > grid.low, x, grid.low).clamp_(max=grid.high)
    v = x.sub_(grid.low).mul_(grid.scale).add_(MAGIC)
    return (pack(rounded(v, words, rounding), bits),)


def decode_groups(codes: Tensor, words: Tensor, out: Tensor, grid: Grid, bits: int, rounding: str) -> None:
    """Write the values of what `encode_groups` returned to `out` [R, G]."""
    q = unpack(codes, bits).to(torch.float32)
    if rounding == "dither":
        q.mul_(256.0).add_(noise_of(words, out.shape[1]).bitwise_not_())
    store(q.mul_(grid.factor).add_(grid.offset), out)


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
