"""What the pack hook returns: self-contained objects that give the tensor back, as often as they are asked."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec, Layout, decode

from .ledger import Charge

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
        charges: Bytes that are alive as long as this handle.
    """

    __slots__ = ("__weakref__", "_charges", "_tensor", "_version")

    def __init__(self, tensor: Tensor, versioned: bool = True, charges: tuple[Charge | None, ...] = ()) -> None:
        # Detached: a result that holds its own node, which holds this handle, would never be freed.
        self._tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self._version = self._tensor._version if versioned else None
        self._charges = charges

    def restore(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: If it has been modified in place since it was saved.
        """
        tensor = self._tensor
        if self._version is not None and tensor._version != self._version:
            raise RuntimeError(
                _MODIFIED.format(type=tensor.type(), shape=list(tensor.shape), now=tensor._version, then=self._version)
            )
        return tensor


class Payload:
    """One encoded memory segment; the handles of all its views share it.

    Args:
        tensors: What the codec returned.
        spec: The codec.
        numel: Elements of the segment.
        dtype: Type of the elements.
        key: Noise key of the encoding.
        backend: Kernel backend, or ``None`` for the fastest.
        charges: Bytes that are alive as long as this payload.
    """

    __slots__ = ("__weakref__", "_backend", "_charges", "_dtype", "_key", "numel", "spec", "tensors")

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        spec: CodecSpec,
        numel: int,
        dtype: torch.dtype,
        key: int,
        backend: str | None,
        charges: tuple[Charge | None, ...],
    ) -> None:
        self.tensors = tensors
        self.spec = spec
        self.numel = numel
        self._dtype = dtype
        self._key = key
        self._backend = backend
        self._charges = charges

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        return decode(
            self.tensors, self.spec, numel=self.numel, dtype=self._dtype, key=self._key, backend=self._backend
        )


class Packed:
    """A tensor stored as a view of a decoded segment.

    Args:
        payload: The encoded segment.
        size: Shape of the tensor.
        stride: Strides of the tensor.
        offset: First element within the segment.
    """

    __slots__ = ("__weakref__", "_offset", "_size", "_stride", "payload")

    def __init__(self, payload: Payload, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> None:
        self.payload = payload
        self._size = size
        self._stride = stride
        self._offset = offset

    def restore(self) -> Tensor:
        """Return the tensor: same dtype, shape, strides and device as the one that was saved."""
        return self.payload.decode().as_strided(self._size, self._stride, self._offset)


class PackedCompact:
    """A tensor with gaps in memory (one chunk of a larger one), stored without them.

    Args:
        payload: The encoded elements.
        layout: Where they go.
    """

    __slots__ = ("__weakref__", "_layout", "payload")

    def __init__(self, payload: Payload, layout: Layout) -> None:
        self.payload = payload
        self._layout = layout

    def restore(self) -> Tensor:
        """Return the tensor: same dtype, shape, strides and device as the one that was saved."""
        return self._layout.unflatten(self.payload.decode())


Handle = Kept | Packed | PackedCompact
