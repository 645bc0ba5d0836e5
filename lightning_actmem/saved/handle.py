"""What the pack hook returns: self-contained objects that give the tensor back, as often as they are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_actmem_kernels import Layout

from .geometry import Geometry
from .ledger import Charge
from .packed_first import PackedFirst
from .payload import EXACT_BITS, AnyPayload

if TYPE_CHECKING:
    from .window import Window

_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: [{type} "
    "{shape}] is at version {now}; expected version {then} instead. Hint: find the in-place change between the forward "
    "and the backward pass (operations such as add_, +=, relu_(), x[...] = y) and replace it by its out-of-place form."
)


class Kept:
    """A tensor kept by reference, with autograd's check for in-place changes.

    Args:
        tensor: The tensor that autograd saves.
        versioned: Whether a change before backward is an error.
        charge: Bytes that are alive as long as this handle.
        others: More of them.
    """

    __slots__ = ("__weakref__", "_charges", "_tensor", "_version")

    depth = 0
    bits = EXACT_BITS

    def __init__(
        self, tensor: Tensor, versioned: bool = True, charge: Charge | None = None, others: tuple[Charge, ...] = ()
    ) -> None:
        # Detached: a result that holds its own node, which holds this handle, would never be freed.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version if versioned else None
        self._charges = (charge, *others)

    @property
    def charge(self) -> Charge | None:
        """Bytes that are alive as long as this handle."""
        return self._charges[0]

    @property
    def versioned(self) -> bool:
        """Whether it keeps one version of the tensor, so that others may share it."""
        return self._version is not None

    @property
    def is_modified(self) -> bool:
        """Whether the tensor has been modified in place since it was saved."""
        return self._version is not None and self._tensor._version != self._version

    def has(self, version: int, dtype: torch.dtype) -> bool:
        """Whether it keeps this version of its storage, unchanged to this day, with elements of this type."""
        return self._version == version == self._tensor._version and self._tensor.dtype == dtype

    def segment(self, start: int, numel: int) -> Tensor:
        """Return so many elements of the storage, as `restore` does the tensor."""
        return self.restore().detach().as_strided((numel,), (1,), start)

    def restore(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: If it has been modified in place since it was saved.
        """
        tensor, version = self._tensor, self._version
        if version is not None and tensor._version != version:
            raise RuntimeError(
                _MODIFIED.format(type=tensor.type(), shape=list(tensor.shape), now=tensor._version, then=version)
            )
        return tensor

    def view(self, geometry: Geometry) -> Kept | None:
        """Return a handle of a view of the same storage, if this one keeps that version of it."""
        if not self.has(geometry.version, geometry.dtype):
            return None
        if geometry == Geometry.of(self._tensor):
            return self
        return Kept(self._tensor.as_strided(geometry.size, geometry.stride, geometry.start), charge=self.charge)


class Packed:
    """A tensor stored as a view of a decoded segment.

    Args:
        payload: The encoded segment.
        size: Shape of the tensor.
        stride: Strides of the tensor.
        offset: First element within the segment.
    """

    __slots__ = ("__weakref__", "_offset", "_size", "_stride", "bits", "depth", "payload")

    def __init__(self, payload: AnyPayload, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> None:
        payload.uses += 1
        self.payload = payload
        self.depth = payload.depth
        self.bits = payload.bits
        self._size = size
        self._stride = stride
        self._offset = offset

    def shows(self, size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
        """Whether it is the whole segment in this shape, and not another view of it."""
        return (tuple(self._size), self._stride, self._offset) == (tuple(size), stride, 0)

    def restore(self) -> Tensor:
        """Return the tensor: same dtype, shape, strides and device as the one that was saved."""
        return self.payload.cache.decode(self.payload).as_strided(self._size, self._stride, self._offset)

    def __del__(self) -> None:
        self.payload.uses -= 1


class PackedCompact:
    """A tensor with gaps in memory (one chunk of a larger one), stored without them.

    Args:
        payload: The encoded elements.
        layout: Where they go.
    """

    __slots__ = ("__weakref__", "_layout", "bits", "depth", "payload")

    def __init__(self, payload: AnyPayload, layout: Layout) -> None:
        payload.uses += 1
        self.payload = payload
        self.depth = payload.depth
        self.bits = payload.bits
        self._layout = layout

    def restore(self) -> Tensor:
        """Return the tensor: same dtype, shape, strides and device as the one that was saved."""
        return self._layout.unflatten(self.payload.cache.decode(self.payload))

    def __del__(self) -> None:
        self.payload.uses -= 1


class Stand:
    """Stands for a tensor whose values backward does not read, or of which it reads one bit per element.

    Args:
        like: The tensor: its shape, dtype and device.
        low: What it is where the mask is off, and everywhere without a mask.
        high: What it is where the mask is on.
        mask: The mask, if it is stored already.
        behind: What other readers of the tensor get, as long as this handle lives.
    """

    __slots__ = ("__weakref__", "_behind", "_high", "_like", "_low", "charge", "mask")

    depth = 0
    bits = 0  # never a substitute for another tensor

    def __init__(
        self,
        like: Tensor,
        low: float = 0.0,
        high: float = 0.0,
        mask: Handle | None = None,
        behind: AnyPayload | None = None,
    ) -> None:
        self._like = torch.Size(like.shape), like.dtype, like.device
        self._low = low
        self._high = high
        self._behind = behind
        self.mask = mask
        self.charge: Charge | None = None

    def restore(self) -> Tensor:
        """Return a tensor of that shape: stride 0 without a mask, so that it takes no memory."""
        size, dtype, device = self._like
        low = torch.full((), self._low, dtype=dtype, device=device)
        if self.mask is None:
            return low.expand(size)
        return torch.where(self.mask.restore(), torch.full((), self._high, dtype=dtype, device=device), low)


class Reshaped:
    """The values of another handle in another shape.

    Args:
        handle: The other handle, of a contiguous tensor.
        size: The shape.
    """

    __slots__ = ("__weakref__", "_handle", "_size", "bits", "depth")

    def __init__(self, handle: Handle, size: tuple[int, ...]) -> None:
        self._handle = handle
        self._size = size
        self.depth: int = handle.depth
        self.bits: int = handle.bits

    def restore(self) -> Tensor:
        """Return the tensor, contiguous."""
        return self._handle.restore().reshape(self._size)


class PoolIndices:
    """The indices of a max pool, stored as positions in their windows.

    Args:
        like: The indices.
        window: The pool.
    """

    __slots__ = ("__weakref__", "_dtype", "_window", "charge", "mask")

    depth = 0
    bits = 0  # never a substitute for another tensor

    def __init__(self, like: Tensor, window: Window) -> None:
        self._dtype = like.dtype
        self._window = window
        self.mask: Handle | None = None  # the positions
        self.charge: Charge | None = None

    def restore(self) -> Tensor:
        """Return the indices: same values, shape, strides and device as those that were saved."""
        assert self.mask is not None, "set when it is placed"
        return self._window.indices(self.mask.restore(), self._dtype)


Handle = Kept | Packed | PackedFirst | PackedCompact | Stand | Reshaped | PoolIndices
