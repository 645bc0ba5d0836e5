"""Quantisation with an exact zero; `lightning_actmem_kernels.reference.relu` says what it computes, uniform.py how."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.bf16 import reciprocal_below
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
from .values import groups_of_tile, inverse, is_finite, load_float, load_quads, step_bits, store_float


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.relu.encode`."""
    codes = empty_codes(flat, bits, group_size)
    steps = codes.new_empty(codes.shape[0], dtype=torch.int16)
    _ENCODE((flat, codes, steps), flat.numel(), (key,), group_size, bits, rounding)
    return codes, steps


def decode(codes: Tensor, steps: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """As `reference.relu.decode`."""
    group_size = 8 * codes.shape[2]
    flat = codes.new_empty(numel, dtype=dtype)
    _DECODE((flat, codes, steps), numel, (key,), group_size, bits, rounding, dtype)
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
    RECIPROCAL: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NEAREST: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    PARTS: tl.constexpr = 2 if GROUP_SIZE > 32 else 1
    WIDTH: tl.constexpr = GROUP_SIZE // (8 * PARTS)
    QUADS: tl.constexpr = WIDTH // 4
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)

    hi = tl.zeros((ROWS, GROUP_SIZE // 16), tl.float32)
    broken = tl.zeros((ROWS, GROUP_SIZE // 16), tl.int32)
    for PART in tl.static_range(16):
        x = load_float(flat_ptr, group, PART * (GROUP_SIZE // 16), numel, GROUP_SIZE, GROUP_SIZE // 16, RAGGED, True)
        finite = is_finite(x)
        broken |= (finite == 0).to(tl.int32)
        hi = tl.maximum(hi, tl.where(finite, x, 0.0))
    bits = step_bits(tl.max(hi, 1), tl.max(broken, 1) == 0, RECIPROCAL)
    tl.store(steps_ptr + group, (bits >> 16).to(tl.int16), stored)

    step = bits.to(tl.float32, bitcast=True)
    sound = (step == step)[:, None]
    scale = (inverse(step) * 256.0)[:, None]
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
            even = lanes_of(_fixed_point(x0, scale, MAGIC), _fixed_point(x2, scale, MAGIC_UPPER))
            odd = lanes_of(_fixed_point(x1, scale, MAGIC), _fixed_point(x3, scale, MAGIC_UPPER))
            if NEAREST:
                even, odd = even + HALVES, odd + HALVES
            else:
                even, odd = add_noise(even, odd, noise_word(a0, c0, a1, c1, S))
            word = store_lanes(codes_ptr, codes, word, even, odd, sound, stored[:, None], S, BITS, GROUP_SIZE // 32)


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
    PARTS: tl.constexpr = 2 if GROUP_SIZE > 32 else 1
    WIDTH: tl.constexpr = GROUP_SIZE // (8 * PARTS)
    QUADS: tl.constexpr = WIDTH // 4
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)

    bits = tl.load(steps_ptr + group).to(tl.int32) << 16
    step = bits.to(tl.float32, bitcast=True)[:, None]
    # Comparisons instead of a maximum: they keep NaN.
    floor = tl.where(step * 0.03125 < TINY, TINY, step * 0.03125)
    fine = step * 0.00390625
    shift = fine * -256.0
    if DITHER:
        shift = fine * -383.5
    for PART in tl.static_range(PARTS):
        codes = group[:, None] * (GROUP_SIZE * BITS // 32) + PART * QUADS + tl.arange(0, QUADS)[None, :]
        start = group[:, None] * GROUP_SIZE + PART * WIDTH + tl.arange(0, WIDTH)[None, :]
        for S in tl.static_range(8):
            even, odd = load_lanes(codes_ptr, codes, S, BITS, GROUP_SIZE // 32)
            if DITHER and S == 0:
                a0, c0, a1, c1 = group_noise(key, group, even, PART * QUADS)
            if DITHER:
                even, odd = less_noise(even, odd, noise_word(a0, c0, a1, c1, S))
            x = join_quads(
                _restored(lower_half(even), fine, shift, floor),
                _restored(lower_half(odd), fine, shift, floor),
                _restored(upper_half(even), fine, shift, floor),
                _restored(upper_half(odd), fine, shift, floor),
            )
            store_float(flat_ptr, start + S * PARTS * WIDTH, x, stored, numel, RAGGED)


@triton.jit
def _fixed_point(x: tl.tensor, scale: tl.tensor, ZERO: tl.constexpr) -> tl.tensor:
    """Above the magic number ZERO: 256 levels up for positive values; the others stay below level 1 with any noise."""
    return tl.where(x > 0.0, x * scale + (ZERO + 256.0), ZERO)


@triton.jit
def _restored(n: tl.tensor, fine: tl.tensor, shift: tl.tensor, floor: tl.tensor) -> tl.tensor:
    # The product of 16 bits by 8 is exact, so that one rounding or two are the same.
    value = tl.fma(n, fine, shift)
    value = tl.where(value < floor, floor, value)
    # 0 * step, not 0: NaN in a group without a step.
    return tl.where(n < 256.0, fine * 0.0, value)


_ENCODE = TiledKernel(
    _encode,
    lambda group_size, bits, rounding: (bits, reciprocal_below((1 << bits) - 2), group_size, rounding == "nearest"),
    reads_pairs=True,
)
_DECODE = TiledKernel(
    _decode,
    lambda group_size, bits, rounding, dtype: (bits, group_size, rounding == "dither", torch.finfo(dtype).tiny),
)
