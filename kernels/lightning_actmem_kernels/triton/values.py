"""Values in memory and in registers: float32 arithmetic, bfloat16 and codes by integer operations on their bits."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import bf16
from .launch import INTERPRETED

_LARGEST_STEP = tl.constexpr(bf16.LARGEST_STEP)
_HIGH_HALF = tl.constexpr(bf16.HIGH_HALF)
_NAN_BITS = tl.constexpr(bf16.NAN_BITS)
_SMALLEST_STEP_BITS = tl.constexpr(bf16.SMALLEST_STEP_BITS)
_INTERPRETED = tl.constexpr(INTERPRETED)
_INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def load_float(ptr: tl.tensor, offsets: tl.tensor) -> tl.tensor:
    """Elements in float32; int16 memory holds bfloat16."""
    x = tl.load(ptr + offsets)
    if ptr.dtype.element_ty == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_groups(
    ptr: tl.tensor, offsets: tl.tensor, stored: tl.tensor, numel: tl.tensor, RAGGED: tl.constexpr
) -> tl.tensor:
    """Elements [R, C] of the stored groups in float32, 0 elsewhere; RAGGED where the tensor may end within a group.

    A mask by group leaves loads as wide as the registers; a mask by element makes them one element wide.
    """
    mask = stored[:, None]
    if RAGGED:
        mask = offsets < numel
    x = tl.load(ptr + offsets, mask, other=0)
    if ptr.dtype.element_ty == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def load_repeating(
    ptr: tl.tensor, offsets: tl.tensor, stored: tl.tensor, numel: tl.tensor, RAGGED: tl.constexpr
) -> tl.tensor:
    """As `load_groups`, with the last element of a ragged tensor in place of those that follow it."""
    if RAGGED:
        return load_float(ptr, tl.minimum(offsets, numel - 1))
    else:
        return load_groups(ptr, offsets, stored, numel, False)


@triton.jit
def store_groups(
    ptr: tl.tensor, offsets: tl.tensor, value: tl.tensor, stored: tl.tensor, numel: tl.tensor, RAGGED: tl.constexpr
) -> None:
    """Store elements [R, C] of the stored groups, as `load_groups` loads them."""
    if RAGGED:
        store_float(ptr, offsets, value, offsets < numel)
    else:
        store_float(ptr, offsets, value, stored[:, None])


@triton.jit
def flip(x: tl.tensor, signs: tl.tensor, S: tl.constexpr) -> tl.tensor:
    """Flip the sign of x where bit S of `signs` is set."""
    bits = x.to(tl.int32, bitcast=True) ^ ((signs << (31 - S)) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_float(ptr: tl.tensor, offsets: tl.tensor, value: tl.tensor, mask: tl.tensor) -> None:
    """Store float32 in the dtype of the memory, rounded to nearest even; float16 saturates as in the reference."""
    if ptr.dtype.element_ty == tl.int16 and not _INTERPRETED:
        tl.store(ptr + offsets, value.to(tl.bfloat16).to(tl.int16, bitcast=True), mask)
    elif ptr.dtype.element_ty == tl.int16:
        # The interpreter truncates its casts.
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(ptr + offsets, tl.where(value == value, rounded, 0x7FC0).to(tl.int16), mask)
    elif ptr.dtype.element_ty == tl.float16:
        value = tl.where(value > 65504.0, 65504.0, value)
        value = tl.where(value < -65504.0, -65504.0, value)
        tl.store(ptr + offsets, value.to(tl.float16), mask)
    else:
        tl.store(ptr + offsets, value, mask)


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
def step_bits(span: tl.tensor, finite: tl.tensor, INTERVALS: tl.constexpr) -> tl.tensor:
    """Bits of the smallest bfloat16 step of which INTERVALS cover `span`: 0, or in [2**-118, 2**126], or NaN beyond."""
    # Older Triton flushes denormals in div_rn. They end as 2**-118 all the same, and `inverse` meets none.
    step = tl.div_rn(span, 1.0 * INTERVALS)
    rounded_up = (step.to(tl.int32, bitcast=True) + 0xFFFF) & _HIGH_HALF
    rounded_up = tl.where(span > 0.0, tl.maximum(rounded_up, _SMALLEST_STEP_BITS), 0)
    return tl.where(finite & (step <= _LARGEST_STEP), rounded_up, _NAN_BITS)


@triton.jit
def inverse(step: tl.tensor) -> tl.tensor:
    """1 / step, and 0 where the step is 0 or NaN."""
    return tl.where(step > 0.0, tl.div_rn(1.0, tl.where(step > 0.0, step, 1.0)), 0.0)


@triton.jit
def empty_word(shape_like: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Zeros wide enough for the 8 codes of a column."""
    if BITS == 8:
        return shape_like.to(tl.int64) * 0
    else:
        return shape_like.to(tl.int32) * 0


@triton.jit
def store_word(
    ptr: tl.tensor, offsets: tl.tensor, word: tl.tensor, mask: tl.tensor, BITS: tl.constexpr, ROW: tl.constexpr
) -> None:
    """Store the bytes of each column's word in BITS rows of ROW bytes."""
    for P in tl.static_range(BITS):
        tl.store(ptr + offsets + P * ROW, ((word >> (8 * P)) & 0xFF).to(tl.uint8), mask)


@triton.jit
def load_word(ptr: tl.tensor, offsets: tl.tensor, mask: tl.tensor, BITS: tl.constexpr, ROW: tl.constexpr) -> tl.tensor:
    """What `store_word` stored."""
    word = empty_word(offsets, BITS)
    for P in tl.static_range(BITS):
        word |= tl.load(ptr + offsets + P * ROW, mask, other=0).to(word.dtype) << (8 * P)
    return word
