"""Parcels: several encoded segments that travel to the host and back as one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec, decode

from .ledger import Charge
from .payload import DecodeCache, Payload
from .whereabouts import Booking

# What the allocators align to: kernels load 16 bytes at a time.
_ALIGNMENT = 256


class Piece(NamedTuple):
    """Where a tensor lies in a parcel.

    Args:
        start: Its first byte.
        stop: The byte after its last one.
        dtype: Its type.
        size: Its shape.
    """

    start: int
    stop: int
    dtype: torch.dtype
    size: torch.Size

    def within(self, buffer: Tensor) -> Tensor:
        """Return the tensor as a view of the parcel's memory."""
        return buffer[self.start : self.stop].view(self.dtype).view(self.size)


def pieces_of(tensors: Sequence[Tensor], start: int = 0) -> tuple[list[Piece], int]:
    """Lay tensors out one after the other.

    Args:
        tensors: The tensors.
        start: Where the first one may begin.

    Returns:
        Their places, and where the next one may begin.
    """
    pieces = []
    for tensor in tensors:
        pieces.append(Piece(start, start + tensor.nbytes, tensor.dtype, tensor.shape))
        start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return pieces, start


class Transfer:
    """A parcel's memory on the device, and the copy from it or into it.

    Args:
        buffer: uint8 [bytes of the parcel], allocated on the stream ``origin``.
        origin: The stream that the parcel's tensors were encoded on.
        done: Tells when the copy is done.
        inbound: Whether the copy goes to the device.

    Attributes:
        pending: Whether work on ``origin`` may still come before the end of the copy: the memory must not be freed.
        unread: Whether nobody has asked for the tensors since they are in the buffer.
        booking: The bytes on the device.
    """

    __slots__ = ("booking", "buffer", "done", "inbound", "origin", "pending", "unread")

    def __init__(self, buffer: Tensor, origin: Any, done: Any, *, inbound: bool) -> None:
        self.buffer = buffer
        self.origin = origin
        self.done = done
        self.inbound = inbound
        self.pending = True
        self.unread = True
        self.booking: Booking | None = None


class Parcel:
    """Encoded segments on the host, and on the device where somebody needs them; lives as long as one of them.

    Args:
        number: Its place in the order of the forward pass.
        host: Its memory on the host.
        nbytes: Bytes in it.
        transfer: The copy that brings it to the host.
        booking: The bytes on the host.
        orphans: Takes a transfer that ends after the parcel's life.
        recycle: Takes the host's memory back.
    """

    __slots__ = ("__weakref__", "_booking", "_orphans", "_recycle", "host", "nbytes", "number", "origin", "transfer")

    def __init__(
        self,
        number: int,
        host: Tensor,
        nbytes: int,
        transfer: Transfer,
        booking: Booking,
        orphans: deque[Transfer],
        recycle: Callable[[Tensor, Any], None],
    ) -> None:
        self.number = number
        self.host = host
        self.nbytes = nbytes
        self.origin = transfer.origin
        self.transfer: Transfer | None = transfer
        self._booking = booking
        self._orphans = orphans
        self._recycle = recycle

    def __del__(self) -> None:
        # In any thread, at any point: what takes more than an append is left to the next one who holds the lock.
        if self.transfer is not None and (self.transfer.pending or self.transfer.unread):
            self._orphans.append(self.transfer)
        self._recycle(self.host, self.origin)


class Fetcher(Protocol):
    """Who brings the tensors of a segment to the device."""

    def tensors_of(self, payload: Movable) -> Sequence[Tensor]:
        """Return what the codec returned, ready for the current stream."""
        ...


class Movable(Payload):
    """An encoded segment that may be on the host.

    Args:
        fetcher: Brings it back.
        saved_bytes: Bytes that it takes.
        tensors: As for `Payload`, like all that follow.
        spec: The codec.
        numel: Elements of the segment.
        dtype: Type of the elements.
        key: Noise key of the encoding.
        backend: Kernel backend, or ``None`` for the fastest.
        cache: Remembers the last decoded segments.
        charges: Bytes that are alive as long as this payload.

    Attributes:
        parcel: The parcel that it lies in; ``None``: it is on the device by itself.
        origin: The stream that it was encoded on.
    """

    __slots__ = ("_fetcher", "_pieces", "origin", "parcel", "saved_bytes")

    def __init__(
        self,
        fetcher: Fetcher,
        saved_bytes: int,
        tensors: tuple[Tensor, ...],
        spec: CodecSpec,
        numel: int,
        dtype: torch.dtype,
        key: int,
        backend: str | None,
        cache: DecodeCache,
        charges: tuple[Charge | None, ...],
    ) -> None:
        super().__init__(tensors, spec, numel, dtype, key, backend, cache, charges)
        self._fetcher = fetcher
        self._pieces: list[Piece] = []
        self.saved_bytes = saved_bytes
        self.parcel: Parcel | None = None
        self.origin: Any = None

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        tensors = tuple(self._fetcher.tensors_of(self))
        return decode(tensors, self.spec, numel=self.numel, dtype=self.dtype, key=self._key, backend=self._backend)

    def move(self, parcel: Parcel, pieces: list[Piece], booking: Booking) -> None:
        """Let go of the tensors, which lie in a parcel now."""
        self.parcel, self._pieces, self.tensors = parcel, pieces, ()
        # The first of a tuple dies last: for a moment the bytes are moved and no longer stored, and never both on the
        # device and in the parcel.
        self._charges = (booking, *self._charges)

    def within(self, buffer: Tensor) -> list[Tensor]:
        """Return the tensors as views of the parcel's memory on the device."""
        return [piece.within(buffer) for piece in self._pieces]
