"""Codes of a column two by two: S in the low half of an int32, S + 4 in the high half, for S from 0 to 3.

Masks are written as signed 32-bit numbers, which is what an int32 takes as a constant.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .values import load_word, store_word


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
def store_pairs(
    ptr: tl.tensor,
    offsets: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mask: tl.tensor,
    BITS: tl.constexpr,
    ROW: tl.constexpr,
) -> None:
    """Store each column's 8 codes in BITS rows of ROW bytes."""
    if BITS == 8:
        # Without a word of 64 bits, which LLVM cannot take apart for Blackwell.
        for P in tl.static_range(8):
            register = first if P % 4 < 2 else second
            byte = register >> (8 * (P % 2) + 16 * (P // 4))
            tl.store(ptr + offsets + P * ROW, (byte & 0xFF).to(tl.uint8), mask)
    else:
        word = first
        if BITS < 4:
            word = (first & 0xFFFF) | ((first >> 16) << 4 * BITS)
        store_word(ptr, offsets, word, mask, BITS, ROW)


@triton.jit
def load_pairs(
    ptr: tl.tensor, offsets: tl.tensor, BITS: tl.constexpr, ROW: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """What `store_pairs` stored."""
    first = offsets.to(tl.int32) * 0
    second = first
    if BITS == 8:
        for P in tl.static_range(8):
            byte = tl.load(ptr + offsets + P * ROW).to(tl.int32) << (8 * (P % 2) + 16 * (P // 4))
            if P % 4 < 2:
                first |= byte
            else:
                second |= byte
    else:
        first = load_word(ptr, offsets, BITS, ROW)
        if BITS < 4:
            first = (first & ((1 << 4 * BITS) - 1)) | ((first >> 4 * BITS) << 16)
    return first, second
