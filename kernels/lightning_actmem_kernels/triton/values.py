"""Values in memory and in registers: float32 arithmetic, bfloat16 and codes by integer operations on their bits."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import bf16
from .lanes import split_quads
from .launch import AMD, INTERPRETED

_LARGEST_STEP = tl.constexpr(bf16.LARGEST_STEP)
_HIGH_HALF = tl.constexpr(bf16.HIGH_HALF)
_NAN_BITS = tl.constexpr(bf16.NAN_BITS)
_SMALLEST_STEP_BITS = tl.constexpr(bf16.SMALLEST_STEP_BITS)
_INTERPRETED = tl.constexpr(INTERPRETED)
_INF_BITS = tl.constexpr(0x7F800000)
_ONE_BITS = tl.constexpr(0x3F800000)


@triton.jit
def groups_of_tile(
    first_tile: tl.int64, numel: tl.int64, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The groups [R] of a program, those past the end replaced by the last one, and which of them are to be stored.

    Loads then need no mask, which would cost registers of zeros.
    """
    group = (first_tile + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    last = (numel - 1) // GROUP_SIZE
    return tl.minimum(group, last), group <= last


@triton.jit
def load_float(
    ptr: tl.tensor,
    group: tl.tensor,
    FIRST: tl.constexpr,
    numel: tl.int64,
    GROUP_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAGGED: tl.constexpr,
    REPEAT: tl.constexpr,
) -> tl.tensor:
    """Elements FIRST to FIRST + COLUMNS of each group in float32.

    Where the tensor may end within a group (RAGGED), the last element is repeated (REPEAT) or zeros follow. Memory of
    int16 holds bfloat16, memory of int32 pairs of them: taking a pair apart costs half of what two single values cost.
    """
    if ptr.dtype.element_ty == tl.int32:
        pair = tl.arange(0, COLUMNS // 2)[None, :]
        words = tl.load(ptr + (group[:, None] * (GROUP_SIZE // 2) + FIRST // 2 + pair))
        values = tl.reshape(tl.join(words << 16, words & _HIGH_HALF), (group.shape[0], COLUMNS))
        return values.to(tl.float32, bitcast=True)
    offsets = group[:, None] * GROUP_SIZE + FIRST + tl.arange(0, COLUMNS)[None, :]
    if not RAGGED:
        x = tl.load(ptr + offsets)
    elif REPEAT:
        x = tl.load(ptr + tl.minimum(offsets, numel - 1))
    else:
        x = tl.load(ptr + offsets, offsets < numel, other=0)
    if ptr.dtype.element_ty == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_quads(
    ptr: tl.tensor,
    group: tl.tensor,
    FIRST: tl.constexpr,
    numel: tl.int64,
    GROUP_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAGGED: tl.constexpr,
    REPEAT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """As `load_float`, columns 4i, 4i + 1, 4i + 2 and 4i + 3 apart."""
    if ptr.dtype.element_ty == tl.int32:
        pair = tl.arange(0, COLUMNS // 2)[None, :]
        words = tl.load(ptr + (group[:, None] * (GROUP_SIZE // 2) + FIRST // 2 + pair))
        left, right = tl.split(tl.reshape(words, (group.shape[0], COLUMNS // 4, 2)))
        return (
            (left << 16).to(tl.float32, bitcast=True),
            (left & _HIGH_HALF).to(tl.float32, bitcast=True),
            (right << 16).to(tl.float32, bitcast=True),
            (right & _HIGH_HALF).to(tl.float32, bitcast=True),
        )
    x0, x1, x2, x3 = split_quads(load_float(ptr, group, FIRST, numel, GROUP_SIZE, COLUMNS, RAGGED, REPEAT))
    return x0, x1, x2, x3


@triton.jit
def store_float(
    ptr: tl.tensor, offsets: tl.tensor, value: tl.tensor, stored: tl.tensor, numel: tl.int64, RAGGED: tl.constexpr
) -> None:
    """Store float32 [R, C] in the dtype of the memory, rounded to nearest even; float16 saturates as in the reference.

    A mask by group leaves stores as wide as the registers; by element, where RAGGED, they are one element wide.
    """
    mask = stored[:, None]
    if RAGGED:
        mask &= offsets < numel
    if ptr.dtype.element_ty == tl.int16 and (_INTERPRETED or AMD):
        # The interpreter truncates its casts. AMD's look out for NaN whose payload could carry, which ours has not.
        bits = value.to(tl.int32, bitcast=True)
        tl.store(ptr + offsets, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16), mask)
    elif ptr.dtype.element_ty == tl.int16:
        tl.store(ptr + offsets, value.to(tl.bfloat16).to(tl.int16, bitcast=True), mask)
    elif ptr.dtype.element_ty == tl.float16:
        value = tl.where(value > 65504.0, 65504.0, value)
        value = tl.where(value < -65504.0, -65504.0, value)
        tl.store(ptr + offsets, value.to(tl.float16), mask)
    else:
        tl.store(ptr + offsets, value, mask)


@triton.jit
def flip(x: tl.tensor, signs: tl.tensor, S: tl.constexpr) -> tl.tensor:
    """Flip the sign of x where bit S of `signs` is set."""
    bits = x.to(tl.int32, bitcast=True) ^ ((signs << (31 - S)) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x: tl.tensor) -> tl.tensor:
    """Whether each float32 is neither NaN nor infinite."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < _INF_BITS


@triton.jit
def round_down(x: tl.tensor) -> tl.tensor:
    """Bits of the largest bfloat16 not above x; -0.0 becomes 0.0."""
    bits = tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))
    return (bits + ((bits >> 31) & 0xFFFF)) & _HIGH_HALF


@triton.jit
def round_nearest(x: tl.tensor) -> tl.tensor:
    """Bits of the bfloat16 nearest to x, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + ((bits >> 16) & 1) + 0x7FFF) & _HIGH_HALF


@triton.jit
def step_bits(span: tl.tensor, finite: tl.tensor, RECIPROCAL: tl.constexpr) -> tl.tensor:
    """As `reference.bf16.step_bits`, RECIPROCAL being that of the intervals; NaN where not `finite`."""
    step = span * RECIPROCAL
    rounded_up = (step.to(tl.int32, bitcast=True) + 0xFFFF) & _HIGH_HALF
    rounded_up = tl.where(span > 0.0, tl.maximum(rounded_up, _SMALLEST_STEP_BITS), 0)
    return tl.where(finite & (step <= _LARGEST_STEP), rounded_up, _NAN_BITS)


@triton.jit
def inverse(step: tl.tensor) -> tl.tensor:
    """1 / step, correctly rounded, of steps as `step_bits` makes them, and 0 where the step is 0 or NaN.

    A division's path for denormal numbers, never taken here, is 100 instructions for each thread.
    """
    bits = step.to(tl.int32, bitcast=True)
    # The 8 bits of the significand alone, so that nothing can under- or overflow: from 1 to 2.
    m = ((bits & 0x007F0000) | _ONE_BITS).to(tl.float32, bitcast=True)
    y = 1.4117647 - 0.47058824 * m  # 24/17 - 8/17 m, off by at most 1/17, which every step squares
    y = y * (2.0 - m * y)
    y = y * (2.0 - m * y)
    # Then once more with an exact remainder, 8 bits by 16 and 8 by 8: a quotient of 8 bits is never so close to halfway
    # between two numbers (2**-33) that what is left of the error (2**-40) could matter.
    high = (y.to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
    y += y * ((1.0 - m * high) - m * (y - high))
    inverted = y.to(tl.int32, bitcast=True) + _ONE_BITS - (bits & _INF_BITS)
    return tl.where(step > 0.0, inverted.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def store_word(
    ptr: tl.tensor, offsets: tl.tensor, word: tl.tensor, mask: tl.tensor, BITS: tl.constexpr, ROW: tl.constexpr
) -> None:
    """Store the bytes of each column's word in BITS rows of ROW bytes, BITS at most 4."""
    for P in tl.static_range(BITS):
        tl.store(ptr + offsets + P * ROW, ((word >> (8 * P)) & 0xFF).to(tl.uint8), mask)


@triton.jit
def load_word(ptr: tl.tensor, offsets: tl.tensor, BITS: tl.constexpr, ROW: tl.constexpr) -> tl.tensor:
    """What `store_word` stored."""
    word = offsets.to(tl.int32) * 0
    for P in tl.static_range(BITS):
        word |= tl.load(ptr + offsets + P * ROW).to(word.dtype) << (8 * P)
    return word
