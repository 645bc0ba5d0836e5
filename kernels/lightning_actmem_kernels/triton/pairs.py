"""Codes of a column two by two: S in the low half of an int32, S + 4 in the high half, for S from 0 to 3.

Masks are written as signed 32-bit numbers, which is what an int32 takes as a constant.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _shifted(x: tl.tensor, LEFT: tl.constexpr) -> tl.tensor:
    if LEFT >= 0:
        return x << LEFT
    else:
        return x >> -LEFT


@triton.jit
def add_pair(
    first: tl.tensor, second: tl.tensor, pair: tl.tensor, S: tl.constexpr, BITS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Add the codes in bits 8 and up of both halves of `pair` to the four codes that each half of a register holds.

    At 8 bits the codes S = 0, 1 go to `first` and 2, 3 to `second`; below, all go to `first`.
    """
    PLACE: tl.constexpr = BITS * (S % 2) if BITS == 8 else BITS * S
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001 << PLACE
    bits = _shifted(pair, PLACE - 8) & ((MASK ^ 0x80000000) - 0x80000000)
    if BITS == 8 and S >= 2:
        second |= bits
    else:
        first |= bits
    return first, second


@triton.jit
def pair_of(first: tl.tensor, second: tl.tensor, S: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Codes S and S + 4 in bits 8 and up of the two halves, zeros elsewhere."""
    PLACE: tl.constexpr = BITS * (S % 2) if BITS == 8 else BITS * S
    register = second if BITS == 8 and S >= 2 else first
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x01000100
    return _shifted(register, 8 - PLACE) & ((MASK ^ 0x80000000) - 0x80000000)


@triton.jit
def unite(first: tl.tensor, second: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """The word of 8 codes: int64 at 8 bits, else int32."""
    if BITS == 8:
        low = (first & 0xFFFF) | (second << 16)
        high = ((first >> 16) & 0xFFFF) | (second & -65536)
        return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
    elif BITS == 4:
        return first
    else:
        return (first & 0xFFFF) | ((first >> 16) << 4 * BITS)


@triton.jit
def divide(word: tl.tensor, BITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """What `unite` was given."""
    if BITS == 8:
        low = word.to(tl.int32)
        high = (word >> 32).to(tl.int32)
        return (low & 0xFFFF) | (high << 16), ((low >> 16) & 0xFFFF) | (high & -65536)
    elif BITS == 4:
        return word, word
    else:
        return (word & ((1 << 4 * BITS) - 1)) | ((word >> 4 * BITS) << 16), word
