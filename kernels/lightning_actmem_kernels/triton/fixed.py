"""Quantisation of a known range; `lightning_actmem_kernels.reference.fixed` says what it computes, uniform.py how."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.chunks import group_count
from ..reference.fixed import Grid
from ..reference.uniform import MAGIC
from .launch import launch_tiles
from .noise import byte_pair, noise_words, zero_of
from .pairs import add_pair, load_pairs, pair_of, store_pairs
from .values import groups_of_tile, load_float, store_float

_MAGIC = tl.constexpr(MAGIC)


def encode(flat: Tensor, bits: int, group_size: int, low: float, high: float, rounding: str, key: int) -> Tensor:
    """As `reference.fixed.encode`."""
    groups = group_count(flat.numel(), group_size)
    codes = torch.empty(groups, bits, group_size // 8, dtype=torch.uint8, device=flat.device)
    grid = Grid.of(low, high, bits, rounding)
    arguments = (flat, codes, flat.numel(), key, grid.low, grid.high, grid.scale)
    constants = (bits, group_size, rounding == "nearest")
    launch_tiles(_encode, arguments, constants, flat.numel(), group_size, reads_pairs=True)
    return codes


def decode(
    codes: Tensor, bits: int, low: float, high: float, rounding: str, key: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.fixed.decode`."""
    group_size = 8 * codes.shape[2]
    flat = torch.empty(numel, dtype=dtype, device=codes.device)
    grid = Grid.of(low, high, bits, rounding)
    arguments = (flat, codes, numel, key, grid.factor, grid.offset)
    launch_tiles(_decode, arguments, (bits, group_size, rounding == "dither"), numel, group_size)
    return flat


@triton.jit
def _fixed_point(x: tl.tensor, low: tl.float32, high: tl.float32, scale: tl.float32) -> tl.tensor:
    """256 times the position on the grid, rounded to nearest, under the upper half of the magic number."""
    x = tl.where(x > low, x, low)
    x = tl.where(x < high, x, high)
    return ((x - low) * scale + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["numel", "key", "low", "high", "scale", "first_tile"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    low: tl.float32,
    high: tl.float32,
    scale: tl.float32,
    first_tile: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NEAREST: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    if not NEAREST:
        data = load_float(flat_ptr, group, 0, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
        w0, w1, w2, w3 = noise_words(key, group[:, None] * COLUMNS + column + zero_of(data.to(tl.int32, bitcast=True)))
    for HALF in tl.static_range(2):
        first = tl.zeros((ROWS, COLUMNS), tl.int32)
        second = first
        for S in tl.static_range(4):
            x = load_float(flat_ptr, group, (2 * S + HALF) * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
            y = load_float(flat_ptr, group, (2 * S + 8 + HALF) * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
            # Shifting drops the magic number of y; that of x is taken off again.
            pair = (_fixed_point(y, low, high, scale) << 16) + _fixed_point(x, low, high, scale)
            if NEAREST:
                pair += 0x00800080 - 0x4B000000
            else:
                pair += byte_pair(w0, w1, w2, w3, HALF, S) - 0x4B000000
            first, second = add_pair(first, second, pair, S, BITS)
        offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + HALF * COLUMNS + column
        store_pairs(codes_ptr, offsets, first, second, stored[:, None], BITS, GROUP_SIZE // 8)


@triton.jit(do_not_specialize=["numel", "key", "factor", "offset", "first_tile"])
def _decode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    factor: tl.float32,
    offset: tl.float32,
    first_tile: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DITHER: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    start = group[:, None] * GROUP_SIZE + column

    offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + column
    first0, second0 = load_pairs(codes_ptr, offsets, BITS, GROUP_SIZE // 8)
    first1, second1 = load_pairs(codes_ptr, offsets + COLUMNS, BITS, GROUP_SIZE // 8)
    if DITHER:
        w0, w1, w2, w3 = noise_words(key, group[:, None] * COLUMNS + column + zero_of(first0))
    for HALF in tl.static_range(2):
        first = first0 if HALF == 0 else first1
        second = second0 if HALF == 0 else second1
        for S in tl.static_range(4):
            pair = pair_of(first, second, S, BITS)
            if DITHER:
                pair |= byte_pair(w0, w1, w2, w3, HALF, S) ^ 0x00FF00FF
            else:
                pair = (pair >> 8) & 0x00FF00FF
            x = _as_float(pair & 0xFFFF) * factor + offset
            y = _as_float((pair >> 16) & 0xFFFF) * factor + offset
            store_float(flat_ptr, start + (2 * S + HALF) * COLUMNS, x, stored, numel, RAGGED)
            store_float(flat_ptr, start + (2 * S + 8 + HALF) * COLUMNS, y, stored, numel, RAGGED)


@triton.jit
def _as_float(n: tl.tensor) -> tl.tensor:
    """Float32 of integers below 2**23, by the magic number: conversions run at a quarter of the rate."""
    return (n | 0x4B000000).to(tl.float32, bitcast=True) - _MAGIC
