"""Per-group min-max quantisation; `lightning_actmem_kernels.reference.uniform` says what it computes.

A tile is R groups by G/16 Philox counters. Byte l of a counter's block belongs to lane l, a slice of G/16 consecutive
elements, and sub-block s of the code layout is lanes 2s and 2s + 1: noise and packing need no exchange between threads.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.chunks import group_count
from .launch import EXACT, as_words, groups_per_program, on_device
from .noise import lane_noise, noise_words
from .values import (
    empty_word,
    inverse,
    is_finite,
    load_float,
    load_word,
    round_down,
    step_bits,
    store_float,
    store_word,
)


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.uniform.encode`."""
    groups = group_count(flat.numel(), group_size)
    codes = torch.empty(groups, bits, group_size // 8, dtype=torch.uint8, device=flat.device)
    grids = torch.empty(groups, dtype=torch.int32, device=flat.device)
    if groups:
        rows = groups_per_program(groups, group_size)
        with on_device(flat):
            _encode[(triton.cdiv(groups, rows),)](
                as_words(flat), codes, grids, flat.numel(), key, bits, group_size, rounding == "nearest", rows, **EXACT
            )
    return codes, grids


def decode(codes: Tensor, grids: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """As `reference.uniform.decode`."""
    groups, group_size = codes.shape[0], 8 * codes.shape[2]
    flat = torch.empty(numel, dtype=dtype, device=codes.device)
    if groups:
        rows = groups_per_program(groups, group_size)
        with on_device(flat):
            _decode[(triton.cdiv(groups, rows),)](
                codes, grids, as_words(flat), numel, key, bits, group_size, rounding == "dither", rows, **EXACT
            )
    return flat


@triton.jit(do_not_specialize=["numel", "key"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    grids_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NEAREST: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    stored = group * GROUP_SIZE < numel
    start = group[:, None] * GROUP_SIZE + column

    lo = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    hi = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    broken = tl.zeros((ROWS, COLUMNS), tl.int32)
    for LANE in tl.static_range(16):
        # The minimum repeats the last element in the last group's padding.
        x = load_float(flat_ptr, tl.minimum(start + LANE * COLUMNS, numel - 1))
        # A reduction may drop NaN, so it is counted apart.
        finite = is_finite(x)
        broken |= (finite == 0).to(tl.int32)
        lo = tl.minimum(lo, tl.where(finite, x, 0.0))
        hi = tl.maximum(hi, tl.where(finite, x, 0.0))
    lo_bits = round_down(tl.min(lo, 1))
    span = tl.max(hi, 1) - lo_bits.to(tl.float32, bitcast=True)
    grid_step = step_bits(span, tl.max(broken, 1) == 0, (1 << BITS) - 1)
    step = grid_step.to(tl.float32, bitcast=True)
    lo_bits = tl.where(step == step, lo_bits, 0)
    tl.store(grids_ptr + group, grid_step | ((lo_bits >> 16) & 0xFFFF), stored)

    sound = (step == step)[:, None]
    low = lo_bits.to(tl.float32, bitcast=True)[:, None]
    inv = inverse(step)[:, None]
    if not NEAREST:
        w0, w1, w2, w3 = noise_words(key, group[:, None] * COLUMNS + column)
    for HALF in tl.static_range(2):
        word = empty_word(start, BITS)
        for S in tl.static_range(8):
            x = load_float(flat_ptr, tl.minimum(start + (2 * S + HALF) * COLUMNS, numel - 1))
            v = (tl.where(sound, x, 0.0) - low) * inv
            if NEAREST:
                v += 0.5
            else:
                v += lane_noise(w0, w1, w2, w3, 2 * S + HALF)
            word |= v.to(tl.int32).to(word.dtype) << (BITS * S)
        offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + HALF * COLUMNS + column
        store_word(codes_ptr, offsets, word, stored[:, None], BITS, GROUP_SIZE // 8)


@triton.jit(do_not_specialize=["numel", "key"])
def _decode(
    codes_ptr: tl.tensor,
    grids_ptr: tl.tensor,
    flat_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DITHER: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    stored = group * GROUP_SIZE < numel
    start = group[:, None] * GROUP_SIZE + column

    grid = tl.load(grids_ptr + group, stored, other=0)[:, None]
    step = (grid & -65536).to(tl.float32, bitcast=True)
    low = (grid << 16).to(tl.float32, bitcast=True)
    if DITHER:
        w0, w1, w2, w3 = noise_words(key, group[:, None] * COLUMNS + column)
    for HALF in tl.static_range(2):
        offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + HALF * COLUMNS + column
        word = load_word(codes_ptr, offsets, stored[:, None], BITS, GROUP_SIZE // 8)
        for S in tl.static_range(8):
            value = ((word >> (BITS * S)) & ((1 << BITS) - 1)).to(tl.float32)
            if DITHER:
                value = (value + 0.5) - lane_noise(w0, w1, w2, w3, 2 * S + HALF)
            element = start + (2 * S + HALF) * COLUMNS
            store_float(flat_ptr, element, value * step + low, element < numel)
