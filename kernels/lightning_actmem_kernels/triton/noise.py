"""The noise of `lightning_actmem_kernels.noise`, in a kernel."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .. import noise

_ROUNDS = tl.constexpr(noise.ROUNDS)


@triton.jit
def noise_words(key: tl.int64, counter: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four 32-bit words of the Philox block at each 64-bit counter."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(key, low, high, zero, zero, _ROUNDS)
    return w0, w1, w2, w3


@triton.jit
def lane_noise(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor, LANE: tl.constexpr) -> tl.tensor:
    """The noise u = (byte + 1/2) / 256 from one of the 16 bytes of each block."""
    if LANE < 4:
        word = w0
    elif LANE < 8:
        word = w1
    elif LANE < 12:
        word = w2
    else:
        word = w3
    byte = (word >> (8 * (LANE % 4))) & 0xFF
    return (byte.to(tl.int32).to(tl.float32) + 0.5) * 0.00390625
