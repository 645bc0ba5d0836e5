"""Randomly rotated groups; `lightning_actmem_kernels.reference.rotated` says what it computes.

A tile is R groups in 8 tensors [R, G/8], one for each sub-block of the code layout: signs, packing and the butterflies
between sub-blocks need no exchange between threads, nor do the butterflies between the columns of one thread.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.grouped import empty_codes
from ..reference.rotated import LEVELS, SQUARED_THRESHOLDS, TOO_LARGE_BITS
from .hadamard import group_sum, hadamard
from .noise import sign_bytes
from .tiles import TiledKernel
from .values import flip, groups_of_tile, load_float, load_word, round_nearest, store_float, store_word

_TOO_LARGE_BITS = tl.constexpr(TOO_LARGE_BITS)
# Level i of b bits is _Lbi, above the threshold _Tbi.
(_L10,) = map(tl.constexpr, LEVELS[1])
_L20, _L21 = map(tl.constexpr, LEVELS[2])
_L30, _L31, _L32, _L33 = map(tl.constexpr, LEVELS[3])
_L40, _L41, _L42, _L43, _L44, _L45, _L46, _L47 = map(tl.constexpr, LEVELS[4])
(_T21,) = map(tl.constexpr, SQUARED_THRESHOLDS[2])
_T31, _T32, _T33 = map(tl.constexpr, SQUARED_THRESHOLDS[3])
_T41, _T42, _T43, _T44, _T45, _T46, _T47 = map(tl.constexpr, SQUARED_THRESHOLDS[4])


def encode(flat: Tensor, bits: int, group_size: int, centre: bool, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.rotated.encode`."""
    codes = empty_codes(flat, bits, group_size)
    scales = codes.new_empty(codes.shape[0], 1 + centre, dtype=torch.int16)
    _ENCODE((flat, codes, scales), flat.numel(), (key,), group_size, bits, centre)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, bits: int, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """As `reference.rotated.decode`."""
    group_size = 8 * codes.shape[2]
    flat = codes.new_empty(numel, dtype=dtype)
    _DECODE((flat, codes, scales), numel, (key,), group_size, bits, scales.shape[1] == 2)
    return flat


@triton.jit
def _magnitude(x: tl.tensor) -> tl.tensor:
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _power_of_two(exponent: tl.tensor) -> tl.tensor:
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _above(above: tl.tensor, code: tl.tensor, level: tl.tensor, HIGHER: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    return tl.where(above, code + 1, code), tl.where(above, HIGHER, level)


@triton.jit
def _quantise(z: tl.tensor, mean_square: tl.tensor, BITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Codes, and |z| times the magnitude of their levels."""
    square = z * z
    code = ((z.to(tl.int32, bitcast=True) >> 31) & 1) << (BITS - 1)
    level = tl.zeros(z.shape, tl.float32)
    # One threshold after another: a binary search takes as many instructions and keeps more of them in registers.
    if BITS == 1:
        level += _L10
    elif BITS == 2:
        code, level = _above(square > mean_square * _T21, code, level + _L20, _L21)
    elif BITS == 3:
        code, level = _above(square > mean_square * _T31, code, level + _L30, _L31)
        code, level = _above(square > mean_square * _T32, code, level, _L32)
        code, level = _above(square > mean_square * _T33, code, level, _L33)
    else:
        code, level = _above(square > mean_square * _T41, code, level + _L40, _L41)
        code, level = _above(square > mean_square * _T42, code, level, _L42)
        code, level = _above(square > mean_square * _T43, code, level, _L43)
        code, level = _above(square > mean_square * _T44, code, level, _L44)
        code, level = _above(square > mean_square * _T45, code, level, _L45)
        code, level = _above(square > mean_square * _T46, code, level, _L46)
        code, level = _above(square > mean_square * _T47, code, level, _L47)
    return code, tl.abs(z) * level


@triton.jit
def _level(code: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Magnitude of the level of a code."""
    bit0 = (code & 1) != 0
    bit1 = (code & 2) != 0
    bit2 = (code & 4) != 0
    if BITS == 1:
        level = tl.zeros(code.shape, tl.float32) + _L10
    elif BITS == 2:
        level = tl.where(bit0, _L21, _L20)
    elif BITS == 3:
        level = tl.where(bit1, tl.where(bit0, _L33, _L32), tl.where(bit0, _L31, _L30))
    else:
        low = tl.where(bit1, tl.where(bit0, _L43, _L42), tl.where(bit0, _L41, _L40))
        high = tl.where(bit1, tl.where(bit0, _L47, _L46), tl.where(bit0, _L45, _L44))
        level = tl.where(bit2, high, low)
    return level


@triton.jit
def _load(
    flat_ptr: tl.tensor, group: tl.tensor, numel: tl.int64, GROUP_SIZE: tl.constexpr, RAGGED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The sub-blocks of each group."""
    C: tl.constexpr = GROUP_SIZE // 8
    x0 = load_float(flat_ptr, group, 0, numel, GROUP_SIZE, C, RAGGED, False)
    x1 = load_float(flat_ptr, group, C, numel, GROUP_SIZE, C, RAGGED, False)
    x2 = load_float(flat_ptr, group, 2 * C, numel, GROUP_SIZE, C, RAGGED, False)
    x3 = load_float(flat_ptr, group, 3 * C, numel, GROUP_SIZE, C, RAGGED, False)
    x4 = load_float(flat_ptr, group, 4 * C, numel, GROUP_SIZE, C, RAGGED, False)
    x5 = load_float(flat_ptr, group, 5 * C, numel, GROUP_SIZE, C, RAGGED, False)
    x6 = load_float(flat_ptr, group, 6 * C, numel, GROUP_SIZE, C, RAGGED, False)
    x7 = load_float(flat_ptr, group, 7 * C, numel, GROUP_SIZE, C, RAGGED, False)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _largest(
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    x4: tl.tensor,
    x5: tl.tensor,
    x6: tl.tensor,
    x7: tl.tensor,
) -> tl.tensor:
    """The bits of the largest magnitude of each group: they order as floats do, with inf and NaN above all others."""
    largest = tl.maximum(
        tl.maximum(tl.maximum(_magnitude(x0), _magnitude(x1)), tl.maximum(_magnitude(x2), _magnitude(x3))),
        tl.maximum(tl.maximum(_magnitude(x4), _magnitude(x5)), tl.maximum(_magnitude(x6), _magnitude(x7))),
    )
    return tl.max(largest, 1)


@triton.jit
def _rotated(
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    x4: tl.tensor,
    x5: tl.tensor,
    x6: tl.tensor,
    x7: tl.tensor,
    signs: tl.tensor,
    ROWS: tl.constexpr,
    C: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Groups with random signs, transformed."""
    x0, x1, x2, x3 = flip(x0, signs, 0), flip(x1, signs, 1), flip(x2, signs, 2), flip(x3, signs, 3)
    x4, x5, x6, x7 = flip(x4, signs, 4), flip(x5, signs, 5), flip(x6, signs, 6), flip(x7, signs, 7)
    x0, x1, x2, x3, x4, x5, x6, x7 = hadamard(x0, x1, x2, x3, x4, x5, x6, x7, ROWS, C)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    first_tile: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    C: tl.constexpr = GROUP_SIZE // 8
    tile = first_tile + tl.program_id(0)
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    x0, x1, x2, x3, x4, x5, x6, x7 = _load(flat_ptr, group, numel, GROUP_SIZE, RAGGED)
    largest = _largest(x0, x1, x2, x3, x4, x5, x6, x7)
    sound = largest < _TOO_LARGE_BITS
    exponent = tl.minimum(tl.maximum(largest >> 23, 1), 253)
    unit = _power_of_two(exponent)
    shrink = _power_of_two(254 - exponent)[:, None]
    x0, x1, x2, x3 = x0 * shrink, x1 * shrink, x2 * shrink, x3 * shrink
    x4, x5, x6, x7 = x4 * shrink, x5 * shrink, x6 * shrink, x7 * shrink
    if CENTRE:
        mean = group_sum(x0, x1, x2, x3, x4, x5, x6, x7, ROWS, C) * (1.0 / GROUP_SIZE) * unit
        mean = tl.where(sound, round_nearest(mean), 0)
        tl.store(scales_ptr + 2 * group + 1, (mean >> 16).to(tl.int16), stored)
        shift = mean.to(tl.float32, bitcast=True)[:, None] * shrink
        x0, x1, x2, x3 = x0 - shift, x1 - shift, x2 - shift, x3 - shift
        x4, x5, x6, x7 = x4 - shift, x5 - shift, x6 - shift, x7 - shift
    signs = sign_bytes(key, tile, ROWS, C)
    x0, x1, x2, x3, x4, x5, x6, x7 = _rotated(x0, x1, x2, x3, x4, x5, x6, x7, signs, ROWS, C)
    energy = group_sum(x0 * x0, x1 * x1, x2 * x2, x3 * x3, x4 * x4, x5 * x5, x6 * x6, x7 * x7, ROWS, C)
    mean_square = (energy * (1.0 / GROUP_SIZE))[:, None]
    q0, p0 = _quantise(x0, mean_square, BITS)
    q4, p4 = _quantise(x4, mean_square, BITS)
    q2, p2 = _quantise(x2, mean_square, BITS)
    q6, p6 = _quantise(x6, mean_square, BITS)
    q1, p1 = _quantise(x1, mean_square, BITS)
    q5, p5 = _quantise(x5, mean_square, BITS)
    q3, p3 = _quantise(x3, mean_square, BITS)
    q7, p7 = _quantise(x7, mean_square, BITS)
    inner = group_sum(p0, p1, p2, p3, p4, p5, p6, p7, ROWS, C)
    nonzero = inner > 0.0
    scale = tl.where(nonzero, tl.div_rn(energy, tl.where(nonzero, inner * (1.0 * GROUP_SIZE), 1.0)), 0.0)
    scale_bits = tl.where(sound, round_nearest(scale * unit) >> 16, 0x7FC0)
    tl.store(scales_ptr + (1 + CENTRE) * group, scale_bits.to(tl.int16), stored)

    word = q0 | (q1 << BITS) | (q2 << 2 * BITS) | (q3 << 3 * BITS)
    word |= (q4 << 4 * BITS) | (q5 << 5 * BITS) | (q6 << 6 * BITS) | (q7 << 7 * BITS)
    offsets = group[:, None] * (C * BITS) + tl.arange(0, C)[None, :]
    store_word(codes_ptr, offsets, tl.where(sound[:, None], word, 0), stored[:, None], BITS, C)


@triton.jit
def _signed_level(word: tl.tensor, BITS: tl.constexpr, S: tl.constexpr) -> tl.tensor:
    """Level of code S of each word."""
    level = _level(word >> (BITS * S), BITS)
    sign = (word << (32 - BITS * (S + 1))) & -0x80000000
    return (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _restored(
    x: tl.tensor, scale: tl.tensor, mean: tl.tensor, signs: tl.tensor, S: tl.constexpr, CENTRE: tl.constexpr
) -> tl.tensor:
    x = flip(x * scale, signs, S)
    if CENTRE:
        x += mean
    return x


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _decode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    first_tile: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    C: tl.constexpr = GROUP_SIZE // 8
    tile = first_tile + tl.program_id(0)
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    column = tl.arange(0, C)[None, :]
    word = load_word(codes_ptr, group[:, None] * (C * BITS) + column, BITS, C)
    x0, x1, x2, x3, x4, x5, x6, x7 = hadamard(
        _signed_level(word, BITS, 0),
        _signed_level(word, BITS, 1),
        _signed_level(word, BITS, 2),
        _signed_level(word, BITS, 3),
        _signed_level(word, BITS, 4),
        _signed_level(word, BITS, 5),
        _signed_level(word, BITS, 6),
        _signed_level(word, BITS, 7),
        ROWS,
        C,
    )
    scale = tl.load(scales_ptr + (1 + CENTRE) * group).to(tl.int32) << 16
    scale = scale.to(tl.float32, bitcast=True)[:, None]
    mean = scale
    if CENTRE:
        mean = tl.load(scales_ptr + 2 * group + 1).to(tl.int32) << 16
        mean = mean.to(tl.float32, bitcast=True)[:, None]
    signs = sign_bytes(key, tile, ROWS, C)
    start = group[:, None] * GROUP_SIZE + column
    store_float(flat_ptr, start, _restored(x0, scale, mean, signs, 0, CENTRE), stored, numel, RAGGED)
    store_float(flat_ptr, start + C, _restored(x1, scale, mean, signs, 1, CENTRE), stored, numel, RAGGED)
    store_float(flat_ptr, start + 2 * C, _restored(x2, scale, mean, signs, 2, CENTRE), stored, numel, RAGGED)
    store_float(flat_ptr, start + 3 * C, _restored(x3, scale, mean, signs, 3, CENTRE), stored, numel, RAGGED)
    store_float(flat_ptr, start + 4 * C, _restored(x4, scale, mean, signs, 4, CENTRE), stored, numel, RAGGED)
    store_float(flat_ptr, start + 5 * C, _restored(x5, scale, mean, signs, 5, CENTRE), stored, numel, RAGGED)
    store_float(flat_ptr, start + 6 * C, _restored(x6, scale, mean, signs, 6, CENTRE), stored, numel, RAGGED)
    store_float(flat_ptr, start + 7 * C, _restored(x7, scale, mean, signs, 7, CENTRE), stored, numel, RAGGED)


def _constants(group_size: int, bits: int, centre: bool) -> tuple[int, ...]:
    return bits, group_size, centre


_ENCODE = TiledKernel(_encode, _constants, sub_blocks=8, reads_pairs=True, words=False)
_DECODE = TiledKernel(_decode, _constants, sub_blocks=8, words=False)
