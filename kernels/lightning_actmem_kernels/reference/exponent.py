"""One power of two per group, as one byte: the scale of the codecs whose elements are scaled without rounding.

    byte 1 to 245: 2**(byte - 119), from 2**-118 to 2**126;  0: a group of zeros;  255: a group without a scale

Between these, 256 / scale and scale / 256 are normal numbers, which no device or mode flushes to zero.
"""

from __future__ import annotations

from math import frexp

import torch
from torch import Tensor

from .bf16 import NAN_BITS

BIAS = 119
LARGEST_BYTE = 245
NO_SCALE = 255
INF_BITS = 0x7F800000
MAGNITUDE = 0x7FFFFFFF
MANTISSA = 0x7FFFFF


def carry_and_shift(top: float) -> tuple[int, int]:
    """Constants of the smallest scale of which `top` covers a float32, in integer operations.

    With m = frexp's significand of `top`, adding the carry to the bits of a magnitude raises its exponent where its
    own significand is above m; the shift takes the exponent of `top` off and adds the bias of the byte.
    """
    significand, exponent = frexp(top)
    return MANTISSA - int((2 * significand - 1) * (MANTISSA + 1)), exponent - 1 + 127 - BIAS


def exponent_bytes(x: Tensor, top: float) -> Tensor:
    """The byte of the smallest power of two s with |x| <= top * s in each group.

    Args:
        x: float32 [R, G].
        top: Largest magnitude that the codes of the group reach, in units of s.

    Returns:
        uint8 [R]: 255 where the group holds NaN or inf, or where s would exceed 2**126.
    """
    carry, shift = carry_and_shift(top)
    largest = torch.maximum(x.amax(1), x.amin(1).neg_()).view(torch.int32) & MAGNITUDE
    byte = ((largest.clamp_max(INF_BITS) + carry) >> 23).sub_(shift).clamp_min_(1)
    byte = torch.where((largest >= INF_BITS) | (byte > LARGEST_BYTE), NO_SCALE, byte)
    return torch.where(largest > 0, byte, 0).to(torch.uint8)


def scale(exponents: Tensor, times: int = 0) -> Tensor:
    """2**times the scale, 0 for zeros, NaN where there is none.

    Args:
        exponents: uint8 [R].
        times: Power of two, from -8 to 0.

    Returns:
        float32 [R, 1].
    """
    byte = exponents.to(torch.int32).unsqueeze(1)
    bits = torch.where(byte > 0, (byte + (127 - BIAS + times)) << 23, 0)
    return torch.where(byte == NO_SCALE, NAN_BITS, bits).view(torch.float32)


def inverse(exponents: Tensor, times: int = 0) -> Tensor:
    """2**times over the scale, 0 where the scale is 0 or missing.

    Args:
        exponents: uint8 [R].
        times: Power of two, from 0 to 8.

    Returns:
        float32 [R, 1].
    """
    byte = exponents.to(torch.int32).unsqueeze(1)
    has_scale = (byte > 0) & (byte < NO_SCALE)
    return torch.where(has_scale, (127 + BIAS + times - byte) << 23, 0).view(torch.float32)
