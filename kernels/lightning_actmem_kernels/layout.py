"""How a strided tensor maps onto a flat segment in memory order, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The geometry of a tensor: flat elements in memory order on one side, size and stride on the other.

    Memory order, not index order: a transposed or channels_last tensor is encoded without a copy, and neighbours in a
    group are neighbours in memory. Expanded dimensions (stride 0) hold one element each in the flat segment.

    Attributes:
        size: The tensor's size.
        stride: The tensor's stride, in elements.
        base_size: Sizes of the dimensions that hold distinct elements, outermost in memory first.
        base_stride: Their strides.
        numel: Elements in the flat segment.
        dense: Whether those elements fill their memory without gaps, so that flattening is a view.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    base_size: tuple[int, ...]
    base_stride: tuple[int, ...]
    numel: int
    dense: bool

    @staticmethod
    def of(t: Tensor) -> Layout | None:
        """The layout of `t`, whose storage offset does not matter.

        Args:
            t: Any strided tensor.

        Returns:
            The layout, or None where elements may share memory other than by expansion (as `unfold` makes them).
        """
        return _layout(tuple(t.shape), t.stride())

    def flatten(self, t: Tensor) -> Tensor:
        """The distinct elements of `t` in memory order.

        Args:
            t: A tensor with this layout's size and stride.

        Returns:
            A contiguous 1-D tensor of `numel` elements: a view of t's memory when `dense`, else a copy.
        """
        t = t.detach()
        if self.dense:
            return t.as_strided((self.numel,), (1,))
        return t.as_strided(self.base_size, self.base_stride).contiguous().view(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """The tensor whose distinct elements in memory order are `flat`.

        Args:
            flat: A contiguous 1-D tensor of `numel` elements, of any dtype and device.

        Returns:
            A tensor of exactly this size and stride: a view of `flat` when `dense`, else newly allocated.
        """
        if self.dense:
            return flat.as_strided(self.size, self.stride)
        t = torch.empty_strided(self.size, self.stride, dtype=flat.dtype, device=flat.device)
        t.as_strided(self.base_size, self.base_stride).copy_(flat.view(self.base_size))
        return t


# Cached: a model repeats a few hundred geometries every step, and the walk over dimensions costs several microseconds.
@lru_cache(maxsize=4096)
def _layout(size: tuple[int, ...], stride: tuple[int, ...]) -> Layout | None:
    if 0 in size:
        return Layout(size, stride, (0,), (1,), 0, True)
    dims = sorted(((st, sz) for sz, st in zip(size, stride, strict=True) if sz > 1 and st != 0), reverse=True)
    # Safe when each dimension steps past all that the inner ones span. Interleaved strides such as (2, 3) may be free
    # of overlap too, but no operation makes them and deciding it in general is NP-hard.
    span = 1
    for st, sz in reversed(dims):
        if st < span:
            return None
        span += (sz - 1) * st
    base_size = tuple(sz for _, sz in dims)
    numel = prod(base_size)
    return Layout(size, stride, base_size, tuple(st for st, _ in dims), numel, span == numel)
