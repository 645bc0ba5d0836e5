"""Quantisation of a known range; `lightning_actmem_kernels.reference.fixed` says what it computes, uniform.py how."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.fixed import Grid
from ..reference.grouped import empty_codes
from .lanes import (
    HALVES,
    MAGIC,
    MAGIC_UPPER,
    add_noise,
    join_quads,
    lanes_of,
    less_noise,
    load_lanes,
    lower_half,
    store_lanes,
    upper_half,
)
from .noise import group_noise, noise_word
from .tiles import TiledKernel
from .values import groups_of_tile, load_quads, store_float


def encode(flat: Tensor, bits: int, group_size: int, low: float, high: float, rounding: str, key: int) -> Tensor:
    """As `reference.fixed.encode`."""
    codes = empty_codes(flat, bits, group_size)
    grid = Grid.of(low, high, bits, rounding)
    _ENCODE((flat, codes), flat.numel(), (key, grid.low, grid.high, grid.scale), group_size, bits, rounding)
    return codes


def decode(
    codes: Tensor, bits: int, low: float, high: float, rounding: str, key: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.fixed.decode`."""
    group_size = 8 * codes.shape[2]
    flat = codes.new_empty(numel, dtype=dtype)
    grid = Grid.of(low, high, bits, rounding)
    _DECODE((flat, codes), numel, (key, grid.factor, grid.offset), group_size, bits, rounding)
    return flat


@triton.jit
def _fixed_point(x: tl.tensor, low: tl.float32, high: tl.float32, scale: tl.float32, ZERO: tl.constexpr) -> tl.tensor:
    """256 times the position on the grid, rounded to nearest, above the magic number ZERO."""
    x = tl.where(x > low, x, low)
    x = tl.where(x < high, x, high)
    return (x - low) * scale + ZERO


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
    PARTS: tl.constexpr = 2 if GROUP_SIZE > 32 else 1
    WIDTH: tl.constexpr = GROUP_SIZE // (8 * PARTS)
    QUADS: tl.constexpr = WIDTH // 4
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    mask = stored[:, None]
    for PART in tl.static_range(PARTS):
        if not NEAREST:
            x0, x1, x2, x3 = load_quads(flat_ptr, group, PART * WIDTH, numel, GROUP_SIZE, WIDTH, RAGGED, True)
            a0, c0, a1, c1 = group_noise(key, group, x0.to(tl.int32, bitcast=True), PART * QUADS)
        word = tl.zeros((ROWS, QUADS), tl.int32)
        codes = group[:, None] * (GROUP_SIZE * BITS // 32) + PART * QUADS + tl.arange(0, QUADS)[None, :]
        for S in tl.static_range(8):
            x0, x1, x2, x3 = load_quads(
                flat_ptr, group, (PARTS * S + PART) * WIDTH, numel, GROUP_SIZE, WIDTH, RAGGED, True
            )
            even = lanes_of(_fixed_point(x0, low, high, scale, MAGIC), _fixed_point(x2, low, high, scale, MAGIC_UPPER))
            odd = lanes_of(_fixed_point(x1, low, high, scale, MAGIC), _fixed_point(x3, low, high, scale, MAGIC_UPPER))
            if NEAREST:
                even, odd = even + HALVES, odd + HALVES
            else:
                even, odd = add_noise(even, odd, noise_word(a0, c0, a1, c1, S))
            word = store_lanes(codes_ptr, codes, word, even, odd, mask, mask, S, BITS, GROUP_SIZE // 32)


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
    PARTS: tl.constexpr = 2 if GROUP_SIZE > 32 else 1
    WIDTH: tl.constexpr = GROUP_SIZE // (8 * PARTS)
    QUADS: tl.constexpr = WIDTH // 4
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    for PART in tl.static_range(PARTS):
        codes = group[:, None] * (GROUP_SIZE * BITS // 32) + PART * QUADS + tl.arange(0, QUADS)[None, :]
        start = group[:, None] * GROUP_SIZE + PART * WIDTH + tl.arange(0, WIDTH)[None, :]
        for S in tl.static_range(8):
            even, odd = load_lanes(codes_ptr, codes, S, BITS, GROUP_SIZE // 32)
            if DITHER and S == 0:
                a0, c0, a1, c1 = group_noise(key, group, even, PART * QUADS)
            if DITHER:
                even, odd = less_noise(even, odd, noise_word(a0, c0, a1, c1, S))
            else:
                even = (even >> 8) & 0x00FF00FF
                odd = (odd >> 8) & 0x00FF00FF
            x = join_quads(
                lower_half(even) * factor + offset,
                lower_half(odd) * factor + offset,
                upper_half(even) * factor + offset,
                upper_half(odd) * factor + offset,
            )
            store_float(flat_ptr, start + S * PARTS * WIDTH, x, stored, numel, RAGGED)


_ENCODE = TiledKernel(
    _encode, lambda group_size, bits, rounding: (bits, group_size, rounding == "nearest"), reads_pairs=True
)
_DECODE = TiledKernel(_decode, lambda group_size, bits, rounding: (bits, group_size, rounding == "dither"))
