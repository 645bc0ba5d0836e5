"""Block floating point; `lightning_actmem_kernels.reference.bfp` says what it computes, uniform.py how."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.bfp import largest_mantissa
from ..reference.chunks import group_count
from ..reference.exponent import NO_SCALE, carry_and_shift
from ..reference.uniform import MAGIC
from .exponent import exponent_byte, inverse, largest_magnitude, scale
from .launch import launch_tiles
from .noise import byte_pair, noise_words, zero_of
from .pairs import add_pair, load_pairs, pair_of, store_pairs
from .values import groups_of_tile, load_float, store_float

_MAGIC = tl.constexpr(MAGIC)
_NO_SCALE = tl.constexpr(NO_SCALE)


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.bfp.encode`."""
    groups = group_count(flat.numel(), group_size)
    codes = torch.empty(groups, bits, group_size // 8, dtype=torch.uint8, device=flat.device)
    exponents = torch.empty(groups, dtype=torch.uint8, device=flat.device)
    top = largest_mantissa(bits)
    constants = (bits, group_size, rounding == "nearest", top, *carry_and_shift(top))
    arguments = (flat, codes, exponents, flat.numel(), key)
    launch_tiles(_encode, arguments, constants, flat.numel(), group_size, reads_pairs=True)
    return codes, exponents


def decode(
    codes: Tensor, exponents: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.bfp.decode`."""
    group_size = 8 * codes.shape[2]
    flat = torch.empty(numel, dtype=dtype, device=codes.device)
    constants = (bits, group_size, rounding == "dither", largest_mantissa(bits))
    launch_tiles(_decode, (flat, codes, exponents, numel, key), constants, numel, group_size)
    return flat


@triton.jit
def _fixed_point(x: tl.tensor, scale: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    """256 times the mantissa plus TOP, rounded to nearest, under the upper half of the magic number."""
    return (x * scale + (_MAGIC + 256.0 * TOP)).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["numel", "key", "first_tile"])
def _encode(
    flat_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    exponents_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    first_tile: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NEAREST: tl.constexpr,
    TOP: tl.constexpr,
    CARRY: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]

    largest = largest_magnitude(flat_ptr, group, numel, GROUP_SIZE, RAGGED)
    byte = exponent_byte(tl.max(largest, 1), CARRY, SHIFT)
    tl.store(exponents_ptr + group, byte.to(tl.uint8), stored)

    sound = (byte < _NO_SCALE)[:, None]
    fine = inverse(byte, 8)[:, None]
    if not NEAREST:
        counter = group[:, None] * COLUMNS + column + zero_of(largest)
        w0, w1, w2, w3 = noise_words(key, counter)
    for HALF in tl.static_range(2):
        first = tl.zeros((ROWS, COLUMNS), tl.int32)
        second = first
        for S in tl.static_range(4):
            x = load_float(flat_ptr, group, (2 * S + HALF) * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
            y = load_float(flat_ptr, group, (2 * S + 8 + HALF) * COLUMNS, numel, GROUP_SIZE, COLUMNS, RAGGED, True)
            # Shifting drops the magic number of y; that of x is taken off again.
            pair = (_fixed_point(y, fine, TOP) << 16) + _fixed_point(x, fine, TOP)
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
    exponents_ptr: tl.tensor,
    numel: tl.int64,
    key: tl.int64,
    first_tile: tl.int64,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DITHER: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = GROUP_SIZE // 16
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    start = group[:, None] * GROUP_SIZE + column

    byte = tl.load(exponents_ptr + group).to(tl.int32)[:, None]
    step = scale(byte, 0)
    if DITHER:
        step = scale(byte, -8)
        low = 0.0 - step * 127.5
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
                x = _minus(pair & 0xFFFF, 256 * TOP) * step + low
                y = _minus((pair >> 16) & 0xFFFF, 256 * TOP) * step + low
            else:
                x = _minus((pair >> 8) & 0xFF, TOP) * step
                y = _minus((pair >> 24) & 0xFF, TOP) * step
            store_float(flat_ptr, start + (2 * S + HALF) * COLUMNS, x, stored, numel, RAGGED)
            store_float(flat_ptr, start + (2 * S + 8 + HALF) * COLUMNS, y, stored, numel, RAGGED)


@triton.jit
def _minus(n: tl.tensor, OFFSET: tl.constexpr) -> tl.tensor:
    """Float32 of n - OFFSET for integers below 2**23, by the magic number: conversions run at a quarter of the rate."""
    return (n | 0x4B000000).to(tl.float32, bitcast=True) - (_MAGIC + OFFSET)
