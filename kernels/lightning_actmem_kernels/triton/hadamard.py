"""Hadamard transforms and sums of groups that lie in a tile as 8 tensors [R, G/8], one for each sub-block."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _butterfly(a: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    return a + b, a - b


@triton.jit
def _partner(x: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr) -> tl.tensor:
    """For each column its partner STRIDE away."""
    # The bits of a pair, added as integers, less one's own: a compiler sees through that to a plain shuffle or
    # register, where splitting and joining tensors goes through shared memory.
    bits = x.to(tl.int32, bitcast=True)
    pairs = tl.reshape(bits, (ROWS, COLUMNS // (2 * STRIDE), 2, STRIDE))
    return tl.reshape(tl.sum(pairs, 2)[:, :, None, :] - pairs, (ROWS, COLUMNS)).to(tl.float32, bitcast=True)


@triton.jit
def _column_butterfly(x: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr) -> tl.tensor:
    upper = (tl.arange(0, COLUMNS)[None, :] // STRIDE) << 31
    own = (x.to(tl.int32, bitcast=True) ^ upper).to(tl.float32, bitcast=True)
    return own + _partner(x, ROWS, COLUMNS, STRIDE)


@triton.jit
def _column_hadamard(x: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Butterflies between columns 1, 2, 4 ... apart; columns are at most 128."""
    for LEVEL in tl.static_range(7):
        if (2 << LEVEL) <= COLUMNS:
            x = _column_butterfly(x, ROWS, COLUMNS, 1 << LEVEL)
    return x


@triton.jit
def hadamard(
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    x4: tl.tensor,
    x5: tl.tensor,
    x6: tl.tensor,
    x7: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Hadamard transform of each group, not normalised: butterflies between sub-blocks, then between columns."""
    x0, x4 = _butterfly(x0, x4)
    x1, x5 = _butterfly(x1, x5)
    x2, x6 = _butterfly(x2, x6)
    x3, x7 = _butterfly(x3, x7)
    x0, x2 = _butterfly(x0, x2)
    x1, x3 = _butterfly(x1, x3)
    x4, x6 = _butterfly(x4, x6)
    x5, x7 = _butterfly(x5, x7)
    x0, x1 = _butterfly(x0, x1)
    x2, x3 = _butterfly(x2, x3)
    x4, x5 = _butterfly(x4, x5)
    x6, x7 = _butterfly(x6, x7)
    x0 = _column_hadamard(x0, ROWS, COLUMNS)
    x1 = _column_hadamard(x1, ROWS, COLUMNS)
    x2 = _column_hadamard(x2, ROWS, COLUMNS)
    x3 = _column_hadamard(x3, ROWS, COLUMNS)
    x4 = _column_hadamard(x4, ROWS, COLUMNS)
    x5 = _column_hadamard(x5, ROWS, COLUMNS)
    x6 = _column_hadamard(x6, ROWS, COLUMNS)
    x7 = _column_hadamard(x7, ROWS, COLUMNS)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def group_sum(
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    x4: tl.tensor,
    x5: tl.tensor,
    x6: tl.tensor,
    x7: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Sums of the groups [R], added in the reference's order, which `tl.sum` of more than two would not keep."""
    x = ((x0 + x4) + (x2 + x6)) + ((x1 + x5) + (x3 + x7))
    for LEVEL in tl.static_range(7):
        if (2 << LEVEL) <= COLUMNS:
            x += _partner(x, ROWS, COLUMNS, 1 << LEVEL)
    # Each column holds the sum now, so the maximum of the bits, which has no trouble with NaN, is its bits.
    return tl.max(x.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
