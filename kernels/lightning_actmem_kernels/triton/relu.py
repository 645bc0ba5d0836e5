"""Quantisation with an exact zero; `lightning_actmem_kernels.reference.relu` says what it computes, uniform.py how."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.chunks import group_count
from .launch import EXACT, as_words, groups_per_program, on_device
from .noise import lane_noise, noise_words
from .values import empty_word, inverse, is_finite, load_float, load_word, step_bits, store_float, store_word


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.relu.encode`."""
    groups = group_count(flat.numel(), group_size)
    codes = torch.empty(groups, bits, group_size // 8, dtype=torch.uint8, device=flat.device)
    steps = torch.empty(groups, dtype=torch.int16, device=flat.device)
    if groups:
        rows = groups_per_program(groups, group_size)
        with on_device(flat):
            _encode[(triton.cdiv(groups, rows),)](
                as_words(flat), codes, steps, flat.numel(), key, bits, group_size, rounding == "nearest", rows, **EXACT
            )
    return codes, steps


def decode(codes: Tensor, steps: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """As `reference.relu.decode`."""
    groups, group_size = codes.shape[0], 8 * codes.shape[2]
    flat = torch.empty(numel, dtype=dtype, device=codes.device)
    if groups:
        rows = groups_per_program(groups, group_size)
        tiny = torch.finfo(dtype).tiny
        with on_device(flat):
            _decode[(triton.cdiv(groups, rows),)](
                codes, steps, as_words(flat), numel, key, bits, group_size, rounding == "dither", tiny, rows, **EXACT
            )
    return flat


@triton.jit(do_not_specialize=["numel", "key"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    steps_ptr: tl.tensor,
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

    hi = tl.zeros((ROWS, COLUMNS), tl.float32)
    broken = tl.zeros((ROWS, COLUMNS), tl.int32)
    for LANE in tl.static_range(16):
        x = load_float(flat_ptr, tl.minimum(start + LANE * COLUMNS, numel - 1))
        finite = is_finite(x)
        broken |= (finite == 0).to(tl.int32)
        hi = tl.maximum(hi, tl.where(finite, x, 0.0))
    bits = step_bits(tl.max(hi, 1), tl.max(broken, 1) == 0, (1 << BITS) - 2)
    tl.store(steps_ptr + group, (bits >> 16).to(tl.int16), stored)

    step = bits.to(tl.float32, bitcast=True)
    sound = (step == step)[:, None]
    inv = inverse(step)[:, None]
    if not NEAREST:
        w0, w1, w2, w3 = noise_words(key, group[:, None] * COLUMNS + column)
    for HALF in tl.static_range(2):
        word = empty_word(start, BITS)
        for S in tl.static_range(8):
            x = load_float(flat_ptr, tl.minimum(start + (2 * S + HALF) * COLUMNS, numel - 1))
            positive = sound & (x > 0.0)
            v = tl.where(positive, x, 0.0) * inv
            if NEAREST:
                v += 0.5
            else:
                v += lane_noise(w0, w1, w2, w3, 2 * S + HALF)
            level = tl.where(positive, v.to(tl.int32) + 1, 0)
            word |= level.to(word.dtype) << (BITS * S)
        offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + HALF * COLUMNS + column
        store_word(codes_ptr, offsets, word, stored[:, None], BITS, GROUP_SIZE // 8)


@triton.jit(do_not_specialize=["numel", "key"])
def _decode(
    codes_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    flat_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DITHER: tl.constexpr,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    stored = group * GROUP_SIZE < numel
    start = group[:, None] * GROUP_SIZE + column

    bits = tl.load(steps_ptr + group, stored, other=0).to(tl.int32) << 16
    step = bits.to(tl.float32, bitcast=True)[:, None]
    # Comparisons instead of a maximum: they keep NaN.
    floor = tl.where(step * 0.03125 < TINY, TINY, step * 0.03125)
    if DITHER:
        w0, w1, w2, w3 = noise_words(key, group[:, None] * COLUMNS + column)
    for HALF in tl.static_range(2):
        offsets = group[:, None] * (GROUP_SIZE * BITS // 8) + HALF * COLUMNS + column
        word = load_word(codes_ptr, offsets, stored[:, None], BITS, GROUP_SIZE // 8)
        for S in tl.static_range(8):
            level = (word >> (BITS * S)) & ((1 << BITS) - 1)
            if DITHER:
                value = ((level.to(tl.float32) - 0.5) - lane_noise(w0, w1, w2, w3, 2 * S + HALF)) * step
            else:
                value = (level.to(tl.float32) - 1.0) * step
            value = tl.where(value < floor, floor, value)
            # 0 * step, not 0: NaN in a group without a step.
            value = tl.where(level == 0, step * 0.0, value)
            element = start + (2 * S + HALF) * COLUMNS
            store_float(flat_ptr, element, value, element < numel)
