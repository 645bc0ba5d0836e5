"""Scaled eight-bit floating point; `lightning_actmem_kernels.reference.fp8` says what it computes.

Tiles and noise are those of uniform.py; a code is a byte, so that nothing is packed. No conversion instruction is used:
those to e4m3 exist on some targets only, and none rounds stochastically.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.exponent import MAGNITUDE, NO_SCALE, carry_and_shift
from ..reference.fp8 import FORMATS
from ..reference.grouped import empty_codes
from .exponent import exponent_byte, inverse, largest_magnitude, scale
from .noise import group_noise, noise_word
from .tiles import TiledKernel
from .values import groups_of_tile, load_quads, store_float

_MAGNITUDE = tl.constexpr(MAGNITUDE)
_NO_SCALE = tl.constexpr(NO_SCALE)


def encode(flat: Tensor, name: str, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.fp8.encode`."""
    codes = empty_codes(flat, 8, group_size)
    exponents = codes.new_empty(codes.shape[0])
    _ENCODE((flat, codes, exponents), flat.numel(), (key,), group_size, name, rounding)
    return codes, exponents


def decode(codes: Tensor, exponents: Tensor, name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """As `reference.fp8.decode`."""
    group_size = 8 * codes.shape[2]
    flat = codes.new_empty(numel, dtype=dtype)
    _DECODE((flat, codes, exponents), numel, (), group_size, name)
    return flat


def _encode_constants(group_size: int, name: str, rounding: str) -> tuple[float, ...]:
    form = FORMATS[name]
    return group_size, rounding == "nearest", form.mantissa, form.bias, *carry_and_shift(form.largest)


def _decode_constants(group_size: int, name: str) -> tuple[float, ...]:
    form = FORMATS[name]
    return group_size, form.mantissa, form.bias


@triton.jit
def _code(
    x: tl.tensor, unit: tl.tensor, noise: tl.tensor, NEAREST: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr
) -> tl.tensor:
    """The code of x / scale, as int32."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    scaled = (x * unit).to(tl.int32, bitcast=True)
    magnitude = (scaled & _MAGNITUDE).to(tl.float32, bitcast=True)
    small = magnitude < SMALLEST_NORMAL
    bits = (magnitude + tl.where(small, SMALLEST_NORMAL, 0.0)).to(tl.int32, bitcast=True)
    if NEAREST:
        bits += ((bits >> DROPPED) & 1) + ((1 << (DROPPED - 1)) - 1)
    else:
        bits += (noise << (DROPPED - 8)) + (1 << (DROPPED - 9))
    rebias = tl.where(small, (128 - BIAS) << MANTISSA, (127 - BIAS) << MANTISSA)
    return ((bits >> DROPPED) - rebias) | ((scaled >> 24) & 0x80)


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    exponents_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    first_tile: tl.int64,
    GROUP_SIZE: tl.constexpr,
    NEAREST: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    CARRY: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    PARTS: tl.constexpr = 2 if GROUP_SIZE > 32 else 1
    WIDTH: tl.constexpr = GROUP_SIZE // (8 * PARTS)
    QUADS: tl.constexpr = WIDTH // 4
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)

    largest = largest_magnitude(flat_ptr, group, numel, GROUP_SIZE, RAGGED)
    byte = exponent_byte(tl.max(largest, 1), CARRY, SHIFT)
    tl.store(exponents_ptr + group, byte.to(tl.uint8), stored)

    sound = (byte < _NO_SCALE)[:, None]
    unit = inverse(byte, 0)[:, None]
    for PART in tl.static_range(PARTS):
        x0, x1, x2, x3 = load_quads(flat_ptr, group, PART * WIDTH, numel, GROUP_SIZE, WIDTH, RAGGED, True)
        noise = tl.zeros((ROWS, QUADS), tl.int32)
        if not NEAREST:
            a0, c0, a1, c1 = group_noise(key, group, x0.to(tl.int32, bitcast=True), PART * QUADS)
        codes = group[:, None] * (GROUP_SIZE // 4) + PART * QUADS + tl.arange(0, QUADS)[None, :]
        for S in tl.static_range(8):
            x0, x1, x2, x3 = load_quads(
                flat_ptr, group, (PARTS * S + PART) * WIDTH, numel, GROUP_SIZE, WIDTH, RAGGED, True
            )
            if not NEAREST:
                noise = noise_word(a0, c0, a1, c1, S).to(tl.int32)
            word = _code(x0, unit, noise & 0xFF, NEAREST, MANTISSA, BIAS)
            word |= _code(x1, unit, (noise >> 8) & 0xFF, NEAREST, MANTISSA, BIAS) << 8
            word |= _code(x2, unit, (noise >> 16) & 0xFF, NEAREST, MANTISSA, BIAS) << 16
            word |= _code(x3, unit, (noise >> 24) & 0xFF, NEAREST, MANTISSA, BIAS) << 24
            tl.store(codes_ptr + codes + S * (GROUP_SIZE // 32), tl.where(sound, word, 0), stored[:, None])


@triton.jit(do_not_specialize=["numel", "first_tile"])
def _decode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    exponents_ptr: tl.tensor,
    numel: tl.int64,
    first_tile: tl.int64,
    GROUP_SIZE: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]

    factor = scale(tl.load(exponents_ptr + group).to(tl.int32)[:, None], 0)
    for LANE in tl.static_range(16):
        offsets = group[:, None] * GROUP_SIZE + LANE * COLUMNS + column
        code = tl.load(codes_ptr + offsets).to(tl.int32)
        magnitude = code & 0x7F
        small = magnitude < (1 << MANTISSA)
        rebias = tl.where(small, (128 - BIAS) << MANTISSA, (127 - BIAS) << MANTISSA)
        value = ((magnitude + rebias) << (23 - MANTISSA)).to(tl.float32, bitcast=True)
        value = (value - tl.where(small, SMALLEST_NORMAL, 0.0)) * factor
        value = (value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
        store_float(flat_ptr, offsets, value, stored, numel, RAGGED)


_ENCODE = TiledKernel(_encode, _encode_constants, reads_pairs=True)
_DECODE = TiledKernel(_decode, _decode_constants, words=False)
