"""Per-group min-max quantisation; `lightning_actmem_kernels.reference.uniform` says what it computes.

A tile is R groups, each in sixteenths (eighths for groups of 32): sub-block s of the code layout is sixteenths 2s and
2s + 1. Each thread owns a vector of 16 bytes in every sixteenth, so noise and packing need no exchange between threads.
"""

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
from .launch import AMD
from .noise import group_noise, noise_word
from .tiles import TiledKernel
from .values import groups_of_tile, inverse, load_float, load_quads, round_down, step_bits, store_float


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.uniform.encode`."""
    codes = empty_codes(flat, bits, group_size)
    grids = codes.new_empty(codes.shape[0], dtype=torch.int32)
    _ENCODE((flat, codes, grids), flat.numel(), (key,), group_size, bits, rounding)
    return codes, grids


def decode(codes: Tensor, grids: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """As `reference.uniform.decode`."""
    group_size = 8 * codes.shape[2]
    flat = codes.new_empty(numel, dtype=dtype)
    _DECODE((flat, codes, grids), numel, (key,), group_size, bits, rounding)
    return flat


@triton.jit
def _lower(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    if AMD:
        return tl.minimum(x, y)
    else:
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    if AMD:
        return tl.maximum(x, y)
    else:
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _odd(word: tl.tensor) -> tl.tensor:
    return (word.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _range(
    flat_ptr: tl.tensor, group: tl.tensor, numel: tl.int64, GROUP_SIZE: tl.constexpr, RAGGED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Minimum and maximum of parts of the groups; NaN, or one of them infinite, where an element is not finite."""
    WIDTH: tl.constexpr = GROUP_SIZE // 16
    if flat_ptr.dtype.element_ty == tl.int32:
        words = flat_ptr + group[:, None] * (GROUP_SIZE // 2) + tl.arange(0, WIDTH // 2)[None, :]
        word = tl.load(words)
        lo = (word << 16).to(tl.float32, bitcast=True)
        odd_lo = word.to(tl.float32, bitcast=True)
        hi, odd_hi = lo, odd_lo
        zero, odd_zero = lo * 0.0, odd_lo * 0.0
        for PART in tl.static_range(1, 16):
            word = tl.load(words + PART * (WIDTH // 2))
            even = (word << 16).to(tl.float32, bitcast=True)
            # With the even column's bits below, the odd one sorts as it does alone: masking them can wait for the end.
            odd = word.to(tl.float32, bitcast=True)
            lo, hi, odd_lo, odd_hi = _lower(lo, even), _higher(hi, even), _lower(odd_lo, odd), _higher(odd_hi, odd)
            zero, odd_zero = tl.fma(even, 0.0, zero), tl.fma(odd, 0.0, odd_zero)
        lo, hi, zero = _lower(lo, _odd(odd_lo)), _higher(hi, _odd(odd_hi)), zero + odd_zero
    else:
        lo = load_float(flat_ptr, group, 0, numel, GROUP_SIZE, WIDTH, RAGGED, True)
        hi, zero = lo, lo * 0.0
        for PART in tl.static_range(1, 16):
            x = load_float(flat_ptr, group, PART * WIDTH, numel, GROUP_SIZE, WIDTH, RAGGED, True)
            lo, hi, zero = _lower(lo, x), _higher(hi, x), tl.fma(x, 0.0, zero)
    if AMD:
        # There a minimum that keeps NaN takes three instructions; 0 times x, NaN where x is not finite, takes half.
        lo = tl.where(zero == zero, lo, float("nan"))
    return lo, hi


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    grids_ptr: tl.tensor,
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

    lo, hi = _range(flat_ptr, group, numel, GROUP_SIZE, RAGGED)
    # A reduction across threads may drop NaN, so it is counted apart. Infinity makes the step infinite.
    number = tl.max((lo != lo).to(tl.int32), 1) == 0
    lo_bits = round_down(tl.min(lo, 1))
    grid_step = step_bits(tl.max(hi, 1) - lo_bits.to(tl.float32, bitcast=True), number, RECIPROCAL)
    step = grid_step.to(tl.float32, bitcast=True)
    lo_bits = tl.where(step == step, lo_bits, 0)
    tl.store(grids_ptr + group, grid_step | ((lo_bits >> 16) & 0xFFFF), stored)

    sound = (step == step)[:, None]
    low = lo_bits.to(tl.float32, bitcast=True)[:, None]
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
            even = lanes_of((x0 - low) * scale + MAGIC, (x2 - low) * scale + MAGIC_UPPER)
            odd = lanes_of((x1 - low) * scale + MAGIC, (x3 - low) * scale + MAGIC_UPPER)
            if NEAREST:
                even, odd = even + HALVES, odd + HALVES
            else:
                even, odd = add_noise(even, odd, noise_word(a0, c0, a1, c1, S))
            word = store_lanes(codes_ptr, codes, word, even, odd, sound, stored[:, None], S, BITS, GROUP_SIZE // 32)


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
    PARTS: tl.constexpr = 2 if GROUP_SIZE > 32 else 1
    WIDTH: tl.constexpr = GROUP_SIZE // (8 * PARTS)
    QUADS: tl.constexpr = WIDTH // 4
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)

    grid = tl.load(grids_ptr + group)[:, None]
    step = (grid & -65536).to(tl.float32, bitcast=True) * 0.00390625
    low = (grid << 16).to(tl.float32, bitcast=True)
    if DITHER:
        low -= step * 127.5
    for PART in tl.static_range(PARTS):
        codes = group[:, None] * (GROUP_SIZE * BITS // 32) + PART * QUADS + tl.arange(0, QUADS)[None, :]
        start = group[:, None] * GROUP_SIZE + PART * WIDTH + tl.arange(0, WIDTH)[None, :]
        for S in tl.static_range(8):
            even, odd = load_lanes(codes_ptr, codes, S, BITS, GROUP_SIZE // 32)
            if DITHER and S == 0:
                a0, c0, a1, c1 = group_noise(key, group, even, PART * QUADS)
            if DITHER:
                even, odd = less_noise(even, odd, noise_word(a0, c0, a1, c1, S))
            # The product of 16 bits by 8 is exact, so that one rounding or two are the same.
            x = join_quads(
                tl.fma(lower_half(even), step, low),
                tl.fma(lower_half(odd), step, low),
                tl.fma(upper_half(even), step, low),
                tl.fma(upper_half(odd), step, low),
            )
            store_float(flat_ptr, start + S * PARTS * WIDTH, x, stored, numel, RAGGED)


_ENCODE = TiledKernel(
    _encode,
    lambda group_size, bits, rounding: (bits, reciprocal_below((1 << bits) - 1), group_size, rounding == "nearest"),
    reads_pairs=True,
)
_DECODE = TiledKernel(_decode, lambda group_size, bits, rounding: (bits, group_size, rounding == "dither"))
