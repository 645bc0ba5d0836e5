"""Integers in the narrowest width that holds them, on the caller's word: checking would synchronise with the device."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE = {4: torch.uint8, 8: torch.uint8, 16: torch.int16, 32: torch.int32}


def integer_bits(bound: int) -> int | None:
    """The narrowest width for values in [0, bound).

    Args:
        bound: One more than the largest value.

    Returns:
        8, 16 or 32, or None when 32 bits do not suffice.
    """
    return next((bits for bits in (8, 16, 32) if bound <= 1 << bits), None)


def encode(flat: Tensor, bits: int) -> Tensor:
    """Keep the low bits of each value.

    Args:
        flat: Integer [n] with values in [0, 2**bits).
        bits: 4, 8, 16 or 32; at most the width of flat's dtype.

    Returns:
        uint8, int16 or int32 [n]; for 4 bits uint8 [ceil(n / 2)], the second half of the values above the first.
    """
    if bits == 4:
        half = -(-flat.numel() // 2)
        packed = flat[:half].to(torch.uint8, copy=True)
        packed[: flat.numel() - half].bitwise_or_(flat[half:].to(torch.uint8) << 4)
        return packed
    return flat.to(STORAGE[bits], copy=True)


def decode(narrow: Tensor, bits: int, dtype: torch.dtype, numel: int) -> Tensor:
    """Restore what `encode` kept.

    Args:
        narrow: uint8, int16 or int32 [n].
        bits: As given to `encode`.
        dtype: uint8, int16, int32 or int64.
        numel: Elements n.

    Returns:
        Integer [n] of that dtype.
    """
    if bits == 4:
        return torch.cat((narrow & 15, (narrow >> 4)[: numel - narrow.numel()])).to(dtype)
    wide = narrow.to(dtype, copy=True)
    if 8 < bits < 8 * dtype.itemsize:
        # Storage is signed: values of the upper half come back negative.
        wide.bitwise_and_((1 << bits) - 1)
    return wide
