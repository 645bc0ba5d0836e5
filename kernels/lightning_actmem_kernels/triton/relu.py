"""Quantisation with an exact zero; `lightning_actmem_kernels.reference.relu` says what it computes, uniform.py how."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.chunks import group_count
from .launch import launch_tiles
from .noise import lane_noise, noise_words, zero_of
from .pairs import add_pair, load_pairs, pair_of, store_pairs
from .values import groups_of_tile, inverse, is_finite, load_float, step_bits, store_float


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.relu.encode`."""
    groups = group_count(flat.numel(), group_size)
    codes = torch.empty(groups, bits, group_size // 8, dtype=torch.uint8, device=flat.device)
    steps = torch.empty(groups, dtype=torch.int16, device=flat.device)
    arguments, constants = (flat, codes, steps, flat.numel(), key), (bits, group_size, rounding == "nearest")
    launch_tiles(_encode, arguments, constants, flat.numel(), group_size, reads_pairs=True)
    return codes, steps


def decode(codes: Tensor, steps: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """As `reference.relu.decode`."""
    group_size = 8 * codes.shape[2]
    flat = torch.empty(numel, dtype=dtype, device=codes.device)
    constants = (bits, group_size, rounding == "dither", torch.finfo(dtype).tiny)
    launch_tiles(_decode, (flat, codes, steps, numel, key), constants, numel, group_size)
    return flat


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    steps_ptr: tl.tensor,
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

    hi = tl.zeros((ROWS, COLUMNS), tl.float32)
    broken = tl.zeros((ROWS, COLUMNS), tl.int32)
    for LANE in tl.static_range(16):
        x = load_float(flat_ptr, group, LANE * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
        finite = is_finite(x)
        broken |= (finite == 0).to(tl.int32)
        hi = tl.maximum(hi, tl.where(finite, x, 0.0))
    bits = step_bits(tl.max(hi, 1), tl.max(broken, 1) == 0, (1 << BITS) - 2)
    tl.store(steps_ptr + group, (bits >> 16).to(tl.int16), stored)

    step = bits.to(tl.float32, bitcast=True)
    sound = (step == step)[:, None]
    inv = inverse(step)[:, None]
    if not NEAREST:
        zero = zero_of(hi.to(tl.int32, bitcast=True))
        w0, w1, w2, w3 = noise_words(key, group[:, None] * COLUMNS + column + zero)
    for HALF in tl.static_range(2):
        first = tl.zeros((ROWS, COLUMNS), tl.int32)
        second = first
        for S in tl.static_range(4):
            x = load_float(flat_ptr, group, (2 * S + HALF) * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
            y = load_float(flat_ptr, group, (2 * S + 8 + HALF) * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
            if NEAREST:
                low = _level(x, sound, inv, 0.5)
                high = _level(y, sound, inv, 0.5)
            else:
                low = _level(x, sound, inv, lane_noise(w0, w1, w2, w3, 2 * S + HALF))
                high = _level(y, sound, inv, lane_noise(w0, w1, w2, w3, 2 * S + 8 + HALF))
            first, second = add_pair(first, second, (low << 8) | (high << 24), S, BITS)
        offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + HALF * COLUMNS + column
        store_pairs(codes_ptr, offsets, first, second, stored[:, None], BITS, GROUP_SIZE // 8)


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _decode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    first_tile: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DITHER: tl.constexpr,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    start = group[:, None] * GROUP_SIZE + column

    bits = tl.load(steps_ptr + group).to(tl.int32) << 16
    step = bits.to(tl.float32, bitcast=True)[:, None]
    # Comparisons instead of a maximum: they keep NaN.
    floor = tl.where(step * 0.03125 < TINY, TINY, step * 0.03125)
    offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + column
    first0, second0 = load_pairs(codes_ptr, offsets, BITS, GROUP_SIZE // 8)
    first1, second1 = load_pairs(codes_ptr, offsets + COLUMNS, BITS, GROUP_SIZE // 8)
    if DITHER:
        w0, w1, w2, w3 = noise_words(key, group[:, None] * COLUMNS + column + zero_of(first0))
    for HALF in tl.static_range(2):
        first = first0 if HALF == 0 else first1
        second = second0 if HALF == 0 else second1
        for S in tl.static_range(8):
            level = (pair_of(first, second, S % 4, BITS) >> (8 + 16 * (S // 4))) & 0xFF
            if DITHER:
                value = ((level.to(tl.float32) - 0.5) - lane_noise(w0, w1, w2, w3, 2 * S + HALF)) * step
            else:
                value = (level.to(tl.float32) - 1.0) * step
            value = tl.where(value < floor, floor, value)
            # 0 * step, not 0: NaN in a group without a step.
            value = tl.where(level == 0, step * 0.0, value)
            element = start + (2 * S + HALF) * COLUMNS
            store_float(flat_ptr, element, value, stored, numel, RAGGED)


@triton.jit
def _level(x: tl.tensor, sound: tl.tensor, inv: tl.tensor, noise: tl.tensor) -> tl.tensor:
    positive = sound & (x > 0.0)
    return tl.where(positive, (tl.where(positive, x, 0.0) * inv + noise).to(tl.int32) + 1, 0)
