"""The noise of `lightning_actmem_kernels.noise`, in a kernel."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .. import noise

_ROUNDS = tl.constexpr(noise.ROUNDS)
_SIGN_STREAM = tl.constexpr(noise.SIGN_STREAM)


@triton.jit
def zero_of(x: tl.tensor) -> tl.tensor:
    """Int32 zeros that depend on int32 data: a counter that holds one is computed in the registers of its data.

    Without it Triton picks a layout of its own for the counters and sends their blocks through shared memory.
    """
    return (x & 0x7FFFFFFF) >> 31


@triton.jit
def noise_words(key: tl.int64, counter: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four 32-bit words of the Philox block at each 64-bit counter."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(key, low, high, zero, zero, _ROUNDS)
    return w0, w1, w2, w3


@triton.jit
def byte_pair(
    w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor, HALF: tl.constexpr, S: tl.constexpr
) -> tl.tensor:
    """The bytes of codes S and S + 4 in the low and the high half of an int32, S below 4."""
    INDEX: tl.constexpr = 2 * HALF + S // 2
    if INDEX == 0:
        word = w0
    elif INDEX == 1:
        word = w1
    elif INDEX == 2:
        word = w2
    else:
        word = w3
    return ((word >> (8 * (S % 2))) & 0x00FF00FF).to(tl.int32)


@triton.jit
def lane_noise(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor, LANE: tl.constexpr) -> tl.tensor:
    """The noise u = (byte + 1/2) / 256 of sixteenth LANE of each group."""
    pair = byte_pair(w0, w1, w2, w3, LANE % 2, LANE // 2 % 4)
    byte = (pair >> (16 * (LANE // 8))) & 0xFF
    return (byte.to(tl.float32) + 0.5) * 0.00390625


@triton.jit
def sign_bytes(key: tl.int64, tile: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """The signs of a tile of groups: int32 [ROWS, COLUMNS], bit s for element s * COLUMNS + column."""
    BLOCKS: tl.constexpr = ROWS * COLUMNS // 16
    counter = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    low = counter.to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(key, low, (counter >> 32).to(tl.uint32), zero + _SIGN_STREAM, zero, _ROUNDS)
    # Joining halves the step between neighbours: words 0 to 3 of a block, then the halves of a word, then its bytes.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(tl.join(halves & 0xFF, halves >> 8), (ROWS, COLUMNS)).to(tl.int32)
