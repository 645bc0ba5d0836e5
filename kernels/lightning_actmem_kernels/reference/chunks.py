"""Walking a flat tensor in chunks of whole groups, so that the temporaries of a chunk stay in cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .memory import keep_heap

# CPU: 2 MiB of float32. With fewer elements the fixed cost of some hundred torch calls per chunk shows (1 << 16 ran at
# 0.4 of the speed on two cores); with more the temporaries fall out of cache (1 << 22: 0.4). On other devices a call
# costs more than the memory of its result.
CHUNK_ELEMENTS_CPU = 1 << 19
CHUNK_ELEMENTS_DEVICE = 1 << 24
# A partly filled last group is padded in a copy of its chunk. From here on (256 KiB of float32) the group is a chunk of
# its own: a few more calls instead of a copy of up to the whole tensor.
COPIED_ELEMENTS = 1 << 16


def group_count(numel: int, group_size: int) -> int:
    """Number of groups that `numel` elements fill, the last one perhaps in part."""
    return -(-numel // group_size)


def group_chunks(numel: int, group_size: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of groups that cover `numel` elements; a part-filled one has its whole range copied."""
    if device.type == "cpu":
        keep_heap()
    groups = group_count(numel, group_size)
    per_chunk = (CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_DEVICE) // group_size
    for first in range(0, groups, per_chunk):
        last = min(first + per_chunk, groups)
        if last * group_size > numel > first * group_size + COPIED_ELEMENTS:
            yield first, last - 1
            first = last - 1
        yield first, last


def load_groups(flat: Tensor, first: int, last: int, group_size: int, *, repeat_last: bool = True) -> Tensor:
    """Groups [first, last) of `flat`, the last one padded.

    Args:
        flat: 1-D contiguous.
        first: First group.
        last: One past the last group.
        group_size: Elements per group G.
        repeat_last: Pad with the last element, which widens no range, instead of zeros, which add no energy.

    Returns:
        [last - first, G] in flat's dtype; may be a view of `flat`, so it must not be written to.
    """
    x = flat[first * group_size : last * group_size]
    missing = (last - first) * group_size - x.numel()
    if missing:
        x = torch.cat((x, x[-1:].expand(missing) if repeat_last else x.new_zeros(missing)))
    return x.view(last - first, group_size)


@contextmanager
def groups_of(flat: Tensor, first: int, last: int, group_size: int) -> Iterator[Tensor]:
    """Memory for decoded groups [first, last) of `flat`: a view of it, or a copy of what lies within it afterwards.

    Args:
        flat: 1-D contiguous, written to.
        first: First group.
        last: One past the last group.
        group_size: Elements per group G.

    Yields:
        [last - first, G] in flat's dtype.
    """
    part = flat[first * group_size : last * group_size]
    if part.numel() == (last - first) * group_size:
        yield part.view(-1, group_size)
    else:
        padded = flat.new_empty(last - first, group_size)
        yield padded
        part.copy_(padded.view(-1)[: part.numel()])


def store(values: Tensor, out: Tensor) -> None:
    """Write float32 values, which may be overwritten, to `out` in its dtype, rounded to nearest even."""
    if out.dtype == torch.float16:
        # Half a step above a maximum near 65504 would become inf, and a loss scaler would skip a sound step.
        values.clamp_(-65504.0, 65504.0)
    out.copy_(values)
