"""The noise of `lightning_actmem_kernels.noise`, in a kernel."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .. import noise

_ROUNDS = tl.constexpr(noise.ROUNDS)
_MULTIPLIER_A = tl.constexpr(noise.MULTIPLIER_A)
_MULTIPLIER_B = tl.constexpr(noise.MULTIPLIER_B)
_WEYL_0 = tl.constexpr(noise.WEYL_0)
_WEYL_1 = tl.constexpr(noise.WEYL_1)
_SIGN_STREAM = tl.constexpr(noise.SIGN_STREAM)
_COLUMN_MULTIPLIER = tl.constexpr(noise.COLUMN_MULTIPLIER)
_V0, _V1, _V2, _V3 = map(tl.constexpr, noise.PLANE_MULTIPLIERS)


@triton.jit
def zero_of(x: tl.tensor) -> tl.tensor:
    """Int32 zeros that depend on int32 data: what holds one is computed in the registers of its data.

    Without it Triton picks a layout of its own for the noise and sends it through shared memory.
    """
    return (x & 0x7FFFFFFF) >> 31


@triton.jit
def _times(x: tl.tensor, MULTIPLIER: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """High and low word of a product: one instruction of 64 bits, where `tl.umulhi` and a product take two."""
    product = x.to(tl.uint64) * MULTIPLIER
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(
    key: tl.int64, counter: tl.tensor, STREAM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four 32-bit words of the Philox block at each 64-bit counter."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = c0 * 0 + STREAM
    c3 = c0 * 0
    # The interpreter gives an integer below 2**32 fewer bits than its annotation says.
    k0 = key.to(tl.uint64).to(tl.uint32)
    k1 = (key.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high_a, low_a = _times(c0, _MULTIPLIER_A)
        high_b, low_b = _times(c2, _MULTIPLIER_B)
        c0 = high_b ^ c1 ^ k0
        c1 = low_b
        c2 = high_a ^ c3 ^ k1
        c3 = low_a
        k0 = (k0 + _WEYL_0).to(tl.uint32)
        k1 = (k1 + _WEYL_1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def group_noise(
    key: tl.int64, group: tl.tensor, data: tl.tensor, FIRST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What `noise_word` needs of each group, for as many words i = FIRST, ... of every sub-block as `data` is wide.

    Only layout and width of `data`, int32 [R, QUADS], matter.
    """
    a0, c0, a1, c1 = philox(key, group, 0)
    i = FIRST + tl.arange(0, data.shape[1])[None, :] + zero_of(data)
    factor = (i + 1).to(tl.uint32) * _COLUMN_MULTIPLIER
    factor ^= factor >> 15
    return a0[:, None], c0[:, None] * factor, a1[:, None], c1[:, None] * factor


@triton.jit
def noise_word(a0: tl.tensor, c0: tl.tensor, a1: tl.tensor, c1: tl.tensor, S: tl.constexpr) -> tl.tensor:
    """The words of sub-block S: uint32 [R, QUADS], byte b for element 4i + b."""
    V: tl.constexpr = _V0 if S % 4 == 0 else _V1 if S % 4 == 1 else _V2 if S % 4 == 2 else _V3
    x = a0 + c0 * V if S < 4 else a1 + c1 * V
    return x ^ (x >> 16)


@triton.jit
def sign_bytes(key: tl.int64, tile: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """The signs of a tile of groups: int32 [ROWS, COLUMNS], bit s for element s * COLUMNS + column."""
    BLOCKS: tl.constexpr = ROWS * COLUMNS // 16
    counter = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    w0, w1, w2, w3 = philox(key, counter, _SIGN_STREAM)
    # Joining halves the step between neighbours: words 0 to 3 of a block, then the halves of a word, then its bytes.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(tl.join(halves & 0xFF, halves >> 8), (ROWS, COLUMNS)).to(tl.int32)
