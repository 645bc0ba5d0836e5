"""Four neighbouring codes in two registers, one for columns 4i and 4i + 2, one for 4i + 1 and 4i + 3, in 16 bits each.

A half holds a fixed-point number, the code in its bits 8 and up and 8 bits of fraction below. So one instruction serves
two elements, and the bytes of four columns come together by shifts and masks alone. Masks are written as signed 32-bit
numbers, which is what an int32 takes as a constant.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .launch import AMD

MAGIC = tl.constexpr(2.0**23)  # see reference/grouped.py
HALVES = tl.constexpr(0x00800080)  # 1/2 in both, to round to nearest
# Shifted up, the bits of MAGIC + n leave n; in the upper half it meets the upper half of the lower one's magic number,
# 0x4B00, which this offset of the number that goes there takes off again.
MAGIC_UPPER = tl.constexpr(2.0**23 + 0x10000 - 0x4B00)


@triton.jit
def _shifted(x: tl.tensor, LEFT: tl.constexpr) -> tl.tensor:
    if LEFT >= 0:
        return x << LEFT
    else:
        return x >> -LEFT


@triton.jit
def _bits(x: tl.tensor) -> tl.tensor:
    return x.to(tl.int32, bitcast=True)


@triton.jit
def split_quads(x: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Columns 4i, 4i + 1, 4i + 2 and 4i + 3 of x [R, W], each [R, W/4]: in registers, nothing moves."""
    halves = tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2))
    even, odd = tl.split(halves)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join_quads(x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """The inverse of `split_quads`."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (x0.shape[0], 4 * x0.shape[1]))


@triton.jit
def lanes_of(lower: tl.tensor, upper: tl.tensor) -> tl.tensor:
    """Fixed-point numbers in two halves, from MAGIC + n and MAGIC_UPPER + n."""
    return (_bits(upper) << 16) + _bits(lower)


@triton.jit
def _float(n: tl.tensor, OFFSET: tl.constexpr) -> tl.tensor:
    if AMD:
        return n.to(tl.float32) - OFFSET
    else:
        # By the magic number: conversions run at a quarter of the rate.
        return (n | 0x4B000000).to(tl.float32, bitcast=True) - (MAGIC + OFFSET)


@triton.jit
def lower_half(lanes: tl.tensor, OFFSET: tl.constexpr = 0) -> tl.tensor:
    """Float32 of the number in the lower half, less OFFSET."""
    return _float(lanes & 0xFFFF, OFFSET)


@triton.jit
def upper_half(lanes: tl.tensor, OFFSET: tl.constexpr = 0) -> tl.tensor:
    """Float32 of the number in the upper half, less OFFSET."""
    return _float((lanes >> 16) & 0xFFFF, OFFSET)


@triton.jit
def packed(even: tl.tensor, odd: tl.tensor, SHIFT: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """The bytes of four columns in an int32, codes at bit SHIFT of each; what lies outside of the byte is cut off."""
    CODE: tl.constexpr = (1 << BITS) - 1
    BYTE: tl.constexpr = (CODE << SHIFT if SHIFT >= 0 else CODE >> -SHIFT) & 0xFF
    ODD: tl.constexpr = ((BYTE * 0x01000100) ^ 0x80000000) - 0x80000000
    return (_shifted(even, SHIFT - 8) & (BYTE * 0x00010001)) | (_shifted(odd, SHIFT) & ODD)


@triton.jit
def unpacked(word: tl.tensor, SHIFT: tl.constexpr, BITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The inverse of `packed`: codes in bits 8 and up of the halves, of even and of odd columns, zeros elsewhere."""
    CODE: tl.constexpr = (1 << BITS) - 1
    BYTE: tl.constexpr = (CODE << SHIFT if SHIFT >= 0 else CODE >> -SHIFT) & 0xFF
    FOUND: tl.constexpr = BYTE >> SHIFT if SHIFT >= 0 else BYTE << -SHIFT
    MASK: tl.constexpr = ((FOUND * 0x01000100) ^ 0x80000000) - 0x80000000
    return _shifted(word, 8 - SHIFT) & MASK, _shifted(word, -SHIFT) & MASK


@triton.jit
def load_lanes(
    ptr: tl.tensor, offsets: tl.tensor, S: tl.constexpr, BITS: tl.constexpr, ROW: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """`unpacked` codes of sub-block S, out of rows of ROW words."""
    SHIFT: tl.constexpr = BITS * S % 8
    word = tl.load(ptr + offsets + (BITS * S // 8) * ROW)
    if SHIFT + BITS > 8:
        # Low bits of the code are the byte's highest, the others the next byte's lowest: together first, then apart.
        rest = tl.load(ptr + offsets + (BITS * S // 8 + 1) * ROW)
        LOW: tl.constexpr = ((1 << (8 - SHIFT)) - 1) * 0x01010101
        word = ((word >> SHIFT) & LOW) | ((rest << (8 - SHIFT)) & ~LOW)
        even, odd = unpacked(word, 0, BITS)
    else:
        even, odd = unpacked(word, SHIFT, BITS)
    return even, odd


@triton.jit
def add_noise(even: tl.tensor, odd: tl.tensor, word: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Fixed-point numbers plus the bytes of a noise word: what is then cut off rounds up in proportion."""
    return even + (word & 0x00FF00FF).to(tl.int32), odd + ((word >> 8) & 0x00FF00FF).to(tl.int32)


@triton.jit
def less_noise(even: tl.tensor, odd: tl.tensor, word: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Codes q with 255 - r below, of the bytes r of a noise word: 256 q + 255 - r."""
    rest = word ^ 0xFFFFFFFF
    return even | (rest & 0x00FF00FF).to(tl.int32), odd | ((rest >> 8) & 0x00FF00FF).to(tl.int32)


@triton.jit
def store_lanes(
    ptr: tl.tensor,
    offsets: tl.tensor,
    word: tl.tensor,
    even: tl.tensor,
    odd: tl.tensor,
    sound: tl.tensor,
    mask: tl.tensor,
    S: tl.constexpr,
    BITS: tl.constexpr,
    ROW: tl.constexpr,
) -> tl.tensor:
    """Put the codes of sub-block S into rows of ROW words: zeros where not `sound`. The inverse of `load_lanes`.

    Returns what has not filled a row yet, to be given as `word` with the next sub-block; zeros at first.
    """
    SHIFT: tl.constexpr = BITS * S % 8
    word |= packed(even, odd, SHIFT, BITS)
    if SHIFT + BITS >= 8:
        tl.store(ptr + offsets + (BITS * S // 8) * ROW, tl.where(sound, word, 0), mask)
        word = packed(even, odd, SHIFT - 8, BITS)
    return word
