"""Walking a flat tensor in chunks of whole groups, so that the temporaries of a chunk stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# CPU: 2 MiB of float32. With fewer elements the fixed cost of some hundred torch calls per chunk shows (1 << 16 ran at
# 0.4 of the speed on two cores); with more the temporaries fall out of cache (1 << 22: 0.4). On other devices a call
# costs more than the memory of its result.
CHUNK_ELEMENTS_CPU = 1 << 19
CHUNK_ELEMENTS_DEVICE = 1 << 24


def group_count(numel: int, group_size: int) -> int:
    """Number of groups that `numel` elements fill, the last one perhaps in part."""
    return -(-numel // group_size)


def group_chunks(numel: int, group_size: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of groups that together cover `numel` elements."""
    groups = group_count(numel, group_size)
    per_chunk = (CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_DEVICE) // group_size
    for first in range(0, groups, per_chunk):
        yield first, min(first + per_chunk, groups)


def load_groups(flat: Tensor, first: int, last: int, group_size: int, *, repeat_last: bool = True) -> Tensor:
    """Groups [first, last) of `flat` in float32, the last one padded.

    Args:
        flat: 1-D contiguous.
        first: First group.
        last: One past the last group.
        group_size: Elements per group G.
        repeat_last: Pad with the last element, which widens no range, instead of zeros, which add no energy.

    Returns:
        float32 [last - first, G]; may be a view of `flat`, so it must not be written to.
    """
    x = flat[first * group_size : last * group_size].to(torch.float32)
    missing = (last - first) * group_size - x.numel()
    if missing:
        x = torch.cat((x, x[-1:].expand(missing) if repeat_last else x.new_zeros(missing)))
    return x.view(last - first, group_size)


def store_groups(values: Tensor, flat: Tensor, first: int) -> None:
    """Write decoded groups into `flat` from group `first` on, cast to its dtype (to nearest even), padding dropped.

    Args:
        values: float32 [R, G].
        flat: 1-D contiguous, written to.
        first: First group.
    """
    if flat.dtype == torch.float16:
        # Half a step above a maximum near 65504 would become inf, and a loss scaler would skip a sound step.
        values.clamp_(-65504.0, 65504.0)
    target = flat[first * values.shape[1] :][: values.numel()]
    target.copy_(values.view(-1)[: target.numel()])
