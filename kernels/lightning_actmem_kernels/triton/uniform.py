"""Per-group min-max quantisation; `lightning_actmem_kernels.reference.uniform` says what it computes.

A tile is R groups by G/16 Philox counters. Each counter serves its own column of 16 elements, G/16 apart, and sub-block
s of the code layout is sixteenths 2s and 2s + 1: noise and packing need no exchange between threads. Codes s and s + 4
of a column are computed in the two halves of one register.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.chunks import group_count
from ..reference.uniform import MAGIC
from .launch import launch_tiles
from .noise import byte_pair, noise_words, zero_of
from .pairs import add_pair, load_pairs, pair_of, store_pairs
from .values import groups_of_tile, inverse, load_float, round_down, step_bits, store_float

_MAGIC = tl.constexpr(MAGIC)


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.uniform.encode`."""
    groups = group_count(flat.numel(), group_size)
    codes = torch.empty(groups, bits, group_size // 8, dtype=torch.uint8, device=flat.device)
    grids = torch.empty(groups, dtype=torch.int32, device=flat.device)
    arguments = (flat, codes, grids, flat.numel(), key)
    constants = (bits, group_size, rounding == "nearest")
    launch_tiles(_encode, arguments, constants, flat.numel(), group_size, reads_pairs=True)
    return codes, grids


def decode(codes: Tensor, grids: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """As `reference.uniform.decode`."""
    group_size = 8 * codes.shape[2]
    flat = torch.empty(numel, dtype=dtype, device=codes.device)
    arguments = (flat, codes, grids, numel, key)
    launch_tiles(_decode, arguments, (bits, group_size, rounding == "dither"), numel, group_size)
    return flat


@triton.jit
def _range(
    flat_ptr: tl.tensor, group: tl.tensor, numel: tl.int64, GROUP_SIZE: tl.constexpr, RAGGED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Minimum and maximum of the 16 elements of each column, NaN where one is."""
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    lo = load_float(flat_ptr, group, 0, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
    hi = lo
    for LANE in tl.static_range(1, 16):
        x = load_float(flat_ptr, group, LANE * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
        lo = tl.minimum(lo, x, propagate_nan=tl.PropagateNan.ALL)
        hi = tl.maximum(hi, x, propagate_nan=tl.PropagateNan.ALL)
    return lo, hi


@triton.jit
def _fixed_point(x: tl.tensor, low: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """256 times the position on the grid, rounded to nearest, under the upper half of the magic number."""
    return ((x - low) * scale + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    grids_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
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

    lo, hi = _range(flat_ptr, group, numel, GROUP_SIZE, RAGGED)
    # A reduction across threads may drop NaN, so it is counted apart. Infinity makes the step infinite.
    number = tl.max((lo != lo).to(tl.int32), 1) == 0
    lo_bits = round_down(tl.min(tl.where(lo == lo, lo, 0.0), 1))
    grid_step = step_bits(
        tl.max(tl.where(hi == hi, hi, 0.0), 1) - lo_bits.to(tl.float32, bitcast=True), number, (1 << BITS) - 1
    )
    step = grid_step.to(tl.float32, bitcast=True)
    lo_bits = tl.where(step == step, lo_bits, 0)
    tl.store(grids_ptr + group, grid_step | ((lo_bits >> 16) & 0xFFFF), stored)

    sound = (step == step)[:, None]
    low = lo_bits.to(tl.float32, bitcast=True)[:, None]
    scale = (inverse(step) * 256.0)[:, None]
    if not NEAREST:
        counter = group[:, None] * COLUMNS + column + zero_of(lo.to(tl.int32, bitcast=True))
        w0, w1, w2, w3 = noise_words(key, counter)
    for HALF in tl.static_range(2):
        first = tl.zeros((ROWS, COLUMNS), tl.int32)
        second = first
        for S in tl.static_range(4):
            x = load_float(flat_ptr, group, (2 * S + HALF) * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
            y = load_float(flat_ptr, group, (2 * S + 8 + HALF) * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
            # Shifting drops the magic number of y; that of x is taken off again.
            pair = (_fixed_point(y, low, scale) << 16) + _fixed_point(x, low, scale)
            if NEAREST:
                pair += 0x00800080 - 0x4B000000
            else:
                pair += byte_pair(w0, w1, w2, w3, HALF, S) - 0x4B000000
            first, second = add_pair(first, second, pair, S, BITS)
        offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + HALF * COLUMNS + column
        first = tl.where(sound, first, 0)
        second = tl.where(sound, second, 0)
        store_pairs(codes_ptr, offsets, first, second, stored[:, None], BITS, GROUP_SIZE // 8)


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _decode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    grids_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
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

    grid = tl.load(grids_ptr + group)[:, None]
    step = (grid & -65536).to(tl.float32, bitcast=True)
    low = (grid << 16).to(tl.float32, bitcast=True)
    if DITHER:
        step *= 0.00390625
        low -= step * 127.5
    offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + column
    first0, second0 = load_pairs(codes_ptr, offsets, BITS, GROUP_SIZE // 8)
    first1, second1 = load_pairs(codes_ptr, offsets + COLUMNS, BITS, GROUP_SIZE // 8)
    if DITHER:
        counter = group[:, None] * COLUMNS + column + zero_of(first0)
        w0, w1, w2, w3 = noise_words(key, counter)
    for HALF in tl.static_range(2):
        first = first0 if HALF == 0 else first1
        second = second0 if HALF == 0 else second1
        for S in tl.static_range(4):
            pair = pair_of(first, second, S, BITS)
            if DITHER:
                pair |= byte_pair(w0, w1, w2, w3, HALF, S) ^ 0x00FF00FF
            else:
                pair = (pair >> 8) & 0x00FF00FF
            x = _as_float(pair & 0xFFFF) * step + low
            y = _as_float((pair >> 16) & 0xFFFF) * step + low
            store_float(flat_ptr, start + (2 * S + HALF) * COLUMNS, x, stored, numel, RAGGED)
            store_float(flat_ptr, start + (2 * S + 8 + HALF) * COLUMNS, y, stored, numel, RAGGED)


@triton.jit
def _as_float(n: tl.tensor) -> tl.tensor:
    """Float32 of integers below 2**23, by the magic number: conversions run at a quarter of the rate."""
    return (n | 0x4B000000).to(tl.float32, bitcast=True) - _MAGIC
