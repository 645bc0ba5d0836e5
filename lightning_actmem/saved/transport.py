"""How a parcel gets to the host and back: on CUDA by a side stream and pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ActMemError
from .parcel import Piece, Transfer


class Transport(Protocol):
    """Copies parcels between device and host, in the order of the calls and beside the device's other work.

    Attributes:
        device_type: The kind of device whose tensors can be moved.
    """

    device_type: str

    def check(self) -> None:
        """Raise an `ActMemError` where there is no such device."""
        ...

    def origin(self, device: torch.device) -> Any:
        """Return the stream that works on a device now: tensors of one parcel have the same."""
        ...

    def send(
        self, tensors: Sequence[Tensor], pieces: Sequence[Piece], nbytes: int, origin: Any
    ) -> tuple[Tensor, Transfer]:
        """Gather tensors in one buffer and begin to copy it to the host.

        Args:
            tensors: Tensors that were made on ``origin``; they may be freed afterwards.
            pieces: Their places in the buffer.
            nbytes: Bytes of the buffer.
            origin: The stream.

        Returns:
            The memory on the host, and the copy.
        """
        ...

    def bring(self, host: Tensor, nbytes: int, origin: Any) -> Transfer:
        """Begin to copy a parcel back to the device."""
        ...

    def read(self, transfer: Transfer) -> None:
        """Have the current stream wait until the buffer holds the parcel."""
        ...

    def finish(self, transfer: Transfer) -> None:
        """Have the stream that the buffer belongs to wait for the end of the copy: then it may be freed."""
        ...

    def recycle(self, host: Tensor, origin: Any) -> None:
        """Take memory of the host back."""
        ...

    def release(self) -> None:
        """Let go of the memory of the host that nobody uses."""
        ...


class CudaTransport:
    """Copies on one side stream for each device, ordered by events; the host never waits.

    Device memory is allocated on the stream that works with it, the origin, and freed to it: the side stream waits
    for the origin before it touches a buffer, the origin waits for the side stream before the buffer is freed. So the
    allocator may hand it out again at once (``record_stream`` would have it wait for the host to look again, and the
    peak would depend on how far the host is ahead).

    Pinned memory is kept for later parcels, since pinning takes milliseconds and stops the device. It may be used again
    without waiting: all copies from it and to it are on the same side stream.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._idle: dict[tuple[torch.device, int], list[Tensor]] = {}

    def check(self) -> None:
        """Raise an `ActMemError` where there is no GPU."""
        if not torch.cuda.is_available():
            raise ActMemError(
                "offload moves packed tensors from a CUDA device to the host, and torch sees no CUDA device. "
                "Set offload=False, or train on a machine with a GPU and a CUDA (or ROCm) build of torch."
            )

    def origin(self, device: torch.device) -> torch.cuda.Stream:
        """Return the device's current stream."""
        return torch.cuda.current_stream(device)

    def send(
        self, tensors: Sequence[Tensor], pieces: Sequence[Piece], nbytes: int, origin: torch.cuda.Stream
    ) -> tuple[Tensor, Transfer]:
        """Gather tensors in one buffer on the origin, and copy it to pinned memory on the side stream."""
        host = self._pinned(nbytes, origin.device)
        with torch.cuda.stream(origin):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=origin.device)
            places = [buffer[piece.start : piece.stop] for piece in pieces]
            torch._foreach_copy_(places, [tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
            gathered = origin.record_event()
        side = self._side(origin.device)
        with torch.cuda.stream(side):
            side.wait_event(gathered)
            host[:nbytes].copy_(buffer, non_blocking=True)
            return host, Transfer(buffer, origin, side.record_event(), inbound=False)

    def bring(self, host: Tensor, nbytes: int, origin: torch.cuda.Stream) -> Transfer:
        """Copy pinned memory to the device, once the origin has come to this point: the buffer may have had readers."""
        with torch.cuda.stream(origin):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=origin.device)
            free = origin.record_event()
        side = self._side(origin.device)
        with torch.cuda.stream(side):
            side.wait_event(free)
            buffer.copy_(host[:nbytes], non_blocking=True)
            return Transfer(buffer, origin, side.record_event(), inbound=True)

    def read(self, transfer: Transfer) -> None:
        """Have the current stream wait for the buffer, and the allocator know of it where it is not the origin."""
        current = torch.cuda.current_stream(transfer.origin.device)
        if current != transfer.origin:
            current.wait_event(transfer.done)
            transfer.buffer.record_stream(current)
        elif transfer.inbound:  # what is on its way out has been gathered on this stream
            self.finish(transfer)

    def finish(self, transfer: Transfer) -> None:
        """Have the origin wait for the end of the copy, once."""
        if transfer.pending:
            transfer.origin.wait_event(transfer.done)
            transfer.pending = False

    def recycle(self, host: Tensor, origin: torch.cuda.Stream) -> None:
        """Keep pinned memory for the device's next parcel."""
        self._idle.setdefault((origin.device, host.nbytes), []).append(host)

    def release(self) -> None:
        """Give idle pinned memory back to torch, which waits for copies that still run."""
        self._idle.clear()

    def _pinned(self, nbytes: int, device: torch.device) -> Tensor:
        """Return pinned memory of at least so many bytes: a power of two, as torch's allocator would make it anyway."""
        size = 1 << (nbytes - 1).bit_length()
        idle = self._idle.get((device, size))
        if idle:
            return idle.pop()
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise ActMemError(
                f"offload needs {size:,} bytes more of pinned host memory, and the system does not give them: {error}. "
                "Let more stay on the device (offload='8GiB'), pack in fewer bits, or take a smaller batch."
            ) from error

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        side = self._sides.get(device)
        if side is None:
            side = self._sides[device] = torch.cuda.Stream(device)
        return side
