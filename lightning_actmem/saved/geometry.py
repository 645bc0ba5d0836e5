"""Views of a storage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Neither quantised nor complex: of these only the bit for the sign of an imaginary part is left to ask for.
REAL = frozenset(
    [
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    ]
)

# A batched tensor of `torch.vmap` has the type of any other, and no storage.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class Geometry(NamedTuple):
    """A view of a storage at one version.

    Args:
        version: Version of the storage's contents (autograd counts in-place changes).
        dtype: Type of the elements.
        size: Shape.
        stride: Strides, in elements.
        start: First element within the storage.
    """

    version: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @staticmethod
    def of(tensor: Tensor) -> Geometry:
        """The geometry of a plain dense tensor, as it is now."""
        return Geometry(
            tensor._version, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        )


def extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the number of elements from a view's first to its last, inclusive."""
    if 0 in size:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense and its own: no subclass, not sparse, not conjugated, not inside a ``vmap``."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not _is_wrapped(tensor)
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_inference() or tensor.is_neg())
        and (tensor.dtype in REAL or not (tensor.is_quantized or tensor.is_conj()))
    )
