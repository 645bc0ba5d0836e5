"""Eight-bit floating point, e4m3 and e5m2, with one power of two per group as scale.

With s the smallest power of two with |x| <= largest * s throughout the group (448 for e4m3, 57344 for e5m2):
    encode: the float8 number next above or below x / s by chance, in proportion (stochastic), or the nearest one, ties
            to even (nearest)
    decode: that number times s
Scaling is exact, and the largest number is reached but never passed: no code is infinite or NaN. The step differs from
binade to binade, so that subtractive dither, which needs one step throughout, does not exist here: the unbiased
rounding is stochastic, with a byte r of the counter (see noise.py) and u = (r + 1/2) / 256. The exponent of s is a byte
(exponent.py); a group that holds NaN or inf decodes to NaN throughout. Integer operations on the bits of float32
throughout, which every device runs alike.

Source: Micikevicius et al., "FP8 formats for deep learning", 2022; a power of two per group: Rouhani et al.,
"Microscaling data formats for deep learning", 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import noise_of
from .chunks import group_chunks, groups_of, store
from .exponent import MAGNITUDE, NO_SCALE, exponent_bytes, inverse, scale
from .grouped import empty_codes, encode_by_chunk
from .memory import empty


class Format(NamedTuple):
    """A float8 format.

    Args:
        mantissa: Bits of the mantissa.
        bias: Bias of the exponent.
        largest: Largest finite number.
    """

    mantissa: int
    bias: int
    largest: float

    @property
    def dropped(self) -> int:
        """Bits of a float32's mantissa that rounding takes off."""
        return 23 - self.mantissa

    @property
    def rebias(self) -> int:
        """Difference between the high bits of a normal number as float32 and its code."""
        return 127 - self.bias << self.mantissa

    @property
    def one(self) -> int:
        """Code of the smallest normal number: one step of the exponent."""
        return 1 << self.mantissa

    @property
    def smallest_normal(self) -> float:
        """Below it the step stays the same."""
        return 2.0 ** (1 - self.bias)


FORMATS = {"fp8_e4m3": Format(3, 7, 448.0), "fp8_e5m2": Format(2, 15, 57344.0)}


def encode(flat: Tensor, name: str, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """Quantise a flat tensor.

    Args:
        flat: 1-D contiguous float32, bfloat16 or float16, n elements in N = ceil(n / G) groups.
        name: Name of the format.
        group_size: Elements per group G.
        rounding: `stochastic` or `nearest`.
        key: 64-bit key of the noise stream.

    Returns:
        Codes in order, uint8 [N, 8, G/8], and exponents, uint8 [N].
    """
    codes = empty_codes(flat, 8, group_size)
    exponents = codes.new_empty(len(codes))
    outputs = (codes.view(-1, group_size), exponents)
    encode_by_chunk(encode_groups, (name, rounding), flat, group_size, key, outputs)
    return codes, exponents


def decode(codes: Tensor, exponents: Tensor, name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Restore what `encode` packed.

    Args:
        codes: uint8 [N, 8, G/8].
        exponents: uint8 [N].
        name: As given to `encode`.
        numel: Elements n.
        dtype: float32, bfloat16 or float16.

    Returns:
        1-D tensor of n elements.
    """
    group_size = 8 * codes.shape[2]
    flat = empty(numel, dtype, codes.device)
    for first, last in group_chunks(numel, group_size, codes.device):
        with groups_of(flat, first, last, group_size) as out:
            store(decode_groups(codes[first:last].view(-1, group_size), exponents[first:last], name), out)
    return flat


def encode_groups(x: Tensor, words: Tensor, name: str, rounding: str) -> tuple[Tensor, Tensor]:
    """Codes [R, G] and exponents of groups x [R, G], with the words of `group_words`."""
    x = x.to(torch.float32)
    form = FORMATS[name]
    exponents = exponent_bytes(x, form.largest)
    scaled = (x * inverse(exponents)).view(torch.int32)
    magnitude = (scaled & MAGNITUDE).view(torch.float32)
    # Adding the smallest normal number brings what is below it to its step.
    small = magnitude < form.smallest_normal
    bits = torch.where(small, magnitude + form.smallest_normal, magnitude).view(torch.int32)
    if rounding == "nearest":
        bits = bits + ((bits >> form.dropped) & 1) + ((1 << form.dropped - 1) - 1)
    else:
        noise = noise_of(words, x.shape[1]).to(torch.int32)
        bits = bits + (noise << form.dropped - 8) + (1 << form.dropped - 9)
    codes = (bits >> form.dropped).sub_(form.rebias).sub_(small.to(torch.int32) * form.one)
    codes.bitwise_or_((scaled >> 24) & 0x80)
    # A group without a scale stores zeros.
    return codes.mul_((exponents < NO_SCALE).unsqueeze(1)).to(torch.uint8), exponents


def decode_groups(codes: Tensor, exponents: Tensor, name: str) -> Tensor:
    """Values, float32 [R, G], of codes [R, G]."""
    form = FORMATS[name]
    wide = codes.to(torch.int32)
    magnitude = wide & 0x7F
    small = (magnitude < form.one).to(torch.int32)
    value = (magnitude.add_(form.rebias).add_(small * form.one) << form.dropped).view(torch.float32)
    value.sub_(small * form.smallest_normal).mul_(scale(exponents))
    return value.view(torch.int32).bitwise_or_((wide & 0x80) << 24).view(torch.float32)
