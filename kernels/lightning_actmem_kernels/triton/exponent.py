"""One power of two per group, in a kernel; `lightning_actmem_kernels.reference.exponent` says what the bytes mean."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import bf16, exponent
from .values import load_float

_NAN_BITS = tl.constexpr(bf16.NAN_BITS)
_INF_BITS = tl.constexpr(exponent.INF_BITS)
_MAGNITUDE = tl.constexpr(exponent.MAGNITUDE)
_BIAS = tl.constexpr(exponent.BIAS)
_LARGEST_BYTE = tl.constexpr(exponent.LARGEST_BYTE)
_NO_SCALE = tl.constexpr(exponent.NO_SCALE)


@triton.jit
def largest_magnitude(
    flat_ptr: tl.tensor, group: tl.tensor, numel: tl.int64, GROUP_SIZE: tl.constexpr, RAGGED: tl.constexpr
) -> tl.tensor:
    """Bits of the largest magnitude of the 16 elements of each column: as integers, NaN is above inf above the rest."""
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    x = load_float(flat_ptr, group, 0, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
    largest = x.to(tl.int32, bitcast=True) & _MAGNITUDE
    for LANE in tl.static_range(1, 16):
        x = load_float(flat_ptr, group, LANE * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & _MAGNITUDE)
    return largest


@triton.jit
def exponent_byte(largest: tl.tensor, CARRY: tl.constexpr, SHIFT: tl.constexpr) -> tl.tensor:
    """The byte of each group, as int32, from the bits of its largest magnitude."""
    byte = tl.maximum(((tl.minimum(largest, _INF_BITS) + CARRY) >> 23) - SHIFT, 1)
    byte = tl.where((largest >= _INF_BITS) | (byte > _LARGEST_BYTE), _NO_SCALE, byte)
    return tl.where(largest > 0, byte, 0)


@triton.jit
def scale(byte: tl.tensor, TIMES: tl.constexpr) -> tl.tensor:
    """2**TIMES the scale, 0 for zeros, NaN where there is none."""
    bits = tl.where(byte > 0, (byte + (127 - _BIAS + TIMES)) << 23, 0)
    return tl.where(byte == _NO_SCALE, _NAN_BITS, bits).to(tl.float32, bitcast=True)


@triton.jit
def inverse(byte: tl.tensor, TIMES: tl.constexpr) -> tl.tensor:
    """2**TIMES over the scale, 0 where the scale is 0 or missing."""
    has_scale = (byte > 0) & (byte < _NO_SCALE)
    return tl.where(has_scale, (127 + _BIAS + TIMES - byte) << 23, 0).to(tl.float32, bitcast=True)
