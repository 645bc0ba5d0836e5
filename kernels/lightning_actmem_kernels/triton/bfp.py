"""Block floating point; `lightning_actmem_kernels.reference.bfp` says what it computes, uniform.py how."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.bfp import largest_mantissa
from ..reference.exponent import NO_SCALE, carry_and_shift
from ..reference.grouped import empty_codes
from .exponent import exponent_byte, inverse, largest_magnitude, scale
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

_NO_SCALE = tl.constexpr(NO_SCALE)


def encode(flat: Tensor, bits: int, group_size: int, rounding: str, key: int) -> tuple[Tensor, Tensor]:
    """As `reference.bfp.encode`."""
    codes = empty_codes(flat, bits, group_size)
    exponents = codes.new_empty(codes.shape[0])
    _ENCODE((flat, codes, exponents), flat.numel(), (key,), group_size, bits, rounding)
    return codes, exponents


def decode(
    codes: Tensor, exponents: Tensor, bits: int, rounding: str, key: int, numel: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.bfp.decode`."""
    group_size = 8 * codes.shape[2]
    flat = codes.new_empty(numel, dtype=dtype)
    _DECODE((flat, codes, exponents), numel, (key,), group_size, bits, rounding)
    return flat


def _encode_constants(group_size: int, bits: int, rounding: str) -> tuple[float, ...]:
    top = largest_mantissa(bits)
    return bits, group_size, rounding == "nearest", top, *carry_and_shift(top)


@triton.jit
def _fixed_point(x: tl.tensor, scale: tl.tensor, TOP: tl.constexpr, ZERO: tl.constexpr) -> tl.tensor:
    """256 times the mantissa plus TOP, rounded to nearest, above the magic number ZERO."""
    return x * scale + (ZERO + 256.0 * TOP)


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
    PARTS: tl.constexpr = 2 if GROUP_SIZE > 32 else 1
    WIDTH: tl.constexpr = GROUP_SIZE // (8 * PARTS)
    QUADS: tl.constexpr = WIDTH // 4
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)

    largest = largest_magnitude(flat_ptr, group, numel, GROUP_SIZE, RAGGED)
    byte = exponent_byte(tl.max(largest, 1), CARRY, SHIFT)
    tl.store(exponents_ptr + group, byte.to(tl.uint8), stored)

    sound = (byte < _NO_SCALE)[:, None]
    fine = inverse(byte, 8)[:, None]
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
            even = lanes_of(_fixed_point(x0, fine, TOP, MAGIC), _fixed_point(x2, fine, TOP, MAGIC_UPPER))
            odd = lanes_of(_fixed_point(x1, fine, TOP, MAGIC), _fixed_point(x3, fine, TOP, MAGIC_UPPER))
            if NEAREST:
                even, odd = even + HALVES, odd + HALVES
            else:
                even, odd = add_noise(even, odd, noise_word(a0, c0, a1, c1, S))
            word = store_lanes(codes_ptr, codes, word, even, odd, sound, stored[:, None], S, BITS, GROUP_SIZE // 32)


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
    PARTS: tl.constexpr = 2 if GROUP_SIZE > 32 else 1
    WIDTH: tl.constexpr = GROUP_SIZE // (8 * PARTS)
    QUADS: tl.constexpr = WIDTH // 4
    group, stored = groups_of_tile(first_tile, numel, GROUP_SIZE, ROWS)

    byte = tl.load(exponents_ptr + group).to(tl.int32)[:, None]
    step = scale(byte, 0)
    if DITHER:
        step = scale(byte, -8)
        low = 0.0 - step * 127.5
    for PART in tl.static_range(PARTS):
        codes = group[:, None] * (GROUP_SIZE * BITS // 32) + PART * QUADS + tl.arange(0, QUADS)[None, :]
        start = group[:, None] * GROUP_SIZE + PART * WIDTH + tl.arange(0, WIDTH)[None, :]
        for S in tl.static_range(8):
            even, odd = load_lanes(codes_ptr, codes, S, BITS, GROUP_SIZE // 32)
            if DITHER and S == 0:
                a0, c0, a1, c1 = group_noise(key, group, even, PART * QUADS)
            if DITHER:
                even, odd = less_noise(even, odd, noise_word(a0, c0, a1, c1, S))
                # Products with a power of two are exact, so that one rounding or two are the same.
                x = join_quads(
                    tl.fma(lower_half(even, 256 * TOP), step, low),
                    tl.fma(lower_half(odd, 256 * TOP), step, low),
                    tl.fma(upper_half(even, 256 * TOP), step, low),
                    tl.fma(upper_half(odd, 256 * TOP), step, low),
                )
            else:
                even = (even >> 8) & 0x00FF00FF
                odd = (odd >> 8) & 0x00FF00FF
                x = join_quads(
                    lower_half(even, TOP) * step,
                    lower_half(odd, TOP) * step,
                    upper_half(even, TOP) * step,
                    upper_half(odd, TOP) * step,
                )
            store_float(flat_ptr, start + S * PARTS * WIDTH, x, stored, numel, RAGGED)


_ENCODE = TiledKernel(_encode, _encode_constants, reads_pairs=True)
_DECODE = TiledKernel(
    _decode, lambda group_size, bits, rounding: (bits, group_size, rounding == "dither", largest_mantissa(bits))
)
