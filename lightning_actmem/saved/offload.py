"""Which encoded segments move to the host, when they come back, and how long they stay on the device."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from threading import Lock
from typing import NoReturn
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from ..errors import ActMemError
from .ledger import Ledger
from .parcel import Movable, Parcel, Piece, Transfer, pieces_of
from .transport import Transport
from .whereabouts import Booking, Whereabouts

# Not yet measured. At 25 GB/s a parcel takes 0.3 ms, of which starting it takes some 3 %.
PARCEL_BYTES = 8 << 20
# Parcels' worth of bytes on their way at one time, in either direction, and at least one parcel.
UNDER_WAY = 3
# Smaller segments stay on the device: the host's time for each is worth more than their bytes.
LEAST_BYTES = 16 << 10


class Offload:
    """Keeps a limited number of stored bytes on the device, and the rest on the host.

    The oldest segments go first: backward needs them last. They wait until they fill a parcel, which is copied while
    the forward pass goes on; its device memory is let go when `UNDER_WAY` others follow. In backward parcels come
    back the latest first, as far ahead as the limit has room, and `UNDER_WAY` of them in any case. What has been read
    lives on the device until its graph is freed, or until `UNDER_WAY` others have been read after it.

    Args:
        ledger: Knows what is stored; learns where.
        limit_bytes: Stored bytes that may be on the device, transfers included; where these take more than all of
            it, or at 0, only what backward needs at once stays. Tensors kept by reference count too, and cannot move.
        transport: Copies.
        parcel_bytes: Bytes of a parcel; a larger segment makes one by itself.
        under_way: Parcels' worth of bytes on their way at one time.
        least_bytes: Segments with fewer bytes stay on the device.
    """

    def __init__(
        self,
        ledger: Ledger,
        limit_bytes: int,
        transport: Transport,
        *,
        parcel_bytes: int = PARCEL_BYTES,
        under_way: int = UNDER_WAY,
        least_bytes: int = LEAST_BYTES,
    ) -> None:
        self._ledger = ledger
        self._places = ledger.whereabouts = Whereabouts()
        self._transport = transport
        self._limit_bytes = limit_bytes
        self._parcel_bytes = parcel_bytes
        self._under_way = under_way
        self._least_bytes = least_bytes
        # Segments that have not been moved, oldest first, and their bytes.
        self._queue: deque[tuple[ReferenceType[Movable], int]] = deque()
        self._queued_bytes = 0
        self._largest_bytes = parcel_bytes
        # Parcels in the order of the forward pass; those on their way to the host; those read last, latest last.
        self._sent: list[ReferenceType[Parcel]] = []
        self._leaving: deque[ReferenceType[Parcel]] = deque()
        self._recent: OrderedDict[int, ReferenceType[Parcel]] = OrderedDict()
        # Copies whose parcel is dead.
        self._orphans: deque[Transfer] = deque()
        # The backward pass that fetches, the parcel that it may need next, and what is on the device for it to read.
        self._pass = -1
        self._next = -1
        self._unread_bytes = 0
        self._suits = False
        self._lock = Lock()  # autograd has a thread for each device

    def check_device(self, device: torch.device) -> None:
        """Raise an `ActMemError` where training on this device would move nothing."""
        self._transport.check()
        if device.type != self._transport.device_type:
            self._refuse(f"training is to run on {str(device)!r}")

    def check(self, module: nn.Module | None) -> None:
        """Raise an `ActMemError` where nothing can be moved: no such device, or a model without a parameter on it."""
        if not self._suits:
            self._transport.check()
        parameters = iter(() if module is None else module.parameters())
        first = next(parameters, None)
        if first is None:
            return
        wanted = self._transport.device_type
        if first.device.type != wanted and not any(parameter.device.type == wanted for parameter in parameters):
            self._refuse(f"{type(module).__name__} has all of its parameters on {str(first.device)!r}")
        self._suits = True

    def start_step(self) -> None:
        """Begin a step: of earlier graphs that live on nothing stays on the device but what has never left it."""
        with self._lock:
            alive = [parcel for reference in self._sent if (parcel := reference()) is not None]
            for number, parcel in enumerate(alive):
                self._let_go(parcel)
                parcel.number = number
            self._sent = [ref(parcel) for parcel in alive]
            self._leaving.clear()
            self._recent.clear()
            self._queue = deque(entry for entry in self._queue if entry[0]() is not None)
            self._queued_bytes = sum(saved_bytes for _, saved_bytes in self._queue)
            self._pass = self._next = -1
            self._bury()

    def end_step(self) -> None:
        """Keep to the limit at the end of the forward pass, parcels full or not."""
        if self._limit_bytes:
            with self._lock:
                self._move_excess(1)

    def release(self) -> None:
        """Let go of what is held for later steps."""
        self.start_step()
        self._largest_bytes = self._parcel_bytes
        self._transport.release()

    def add(self, payload: Movable) -> None:
        """Take note of a segment that has just been encoded, and move older ones if there are too many now.

        Raises:
            ActMemError: If it is not on a device that things can be moved from, and nothing else has been.
        """
        device = payload.tensors[0].device
        if device.type != self._transport.device_type:
            if not self._suits:
                self._refuse(f"a tensor to be packed is on {str(device)!r}")
            return  # part of the model is elsewhere: it stays there
        self._suits = True
        payload.origin = self._transport.origin(device)
        if payload.saved_bytes < self._least_bytes:
            return
        with self._lock:
            self._queue.append((ref(payload), payload.saved_bytes))
            self._queued_bytes += payload.saved_bytes
            self._largest_bytes = max(self._largest_bytes, payload.saved_bytes)
            self._bury()
            self._move_excess(self._parcel_bytes)

    def tensors_of(self, payload: Movable) -> Sequence[Tensor]:
        """Return what the codec returned for a segment, ready for the current stream; fetch what comes next."""
        with self._lock:
            self._bury()
            parcel = payload.parcel
            if parcel is None:
                self._look_ahead(len(self._sent), missed=False)
                return payload.tensors
            missed = parcel.transfer is None
            transfer = parcel.transfer or self._fetch(parcel)
            self._transport.read(transfer)
            tensors = payload.within(transfer.buffer)
            self._note_read(parcel, transfer)
            self._look_ahead(parcel.number, missed)
            return tensors

    def _move_excess(self, least_queued_bytes: int) -> None:
        """Send the oldest segments off while more is kept than the limit leaves beside transfers and the next one."""
        transfers_bytes = max(self._under_way * self._parcel_bytes, self._largest_bytes)
        most_bytes = max(self._limit_bytes - transfers_bytes - self._largest_bytes, self._parcel_bytes)
        while self._queue and self._queued_bytes >= least_queued_bytes:
            self._ledger.settle()
            if self._ledger.live_saved_bytes - self._places.live_moved_bytes <= most_bytes:
                return
            self._send()

    def _send(self) -> None:
        """Send off the oldest segments of one stream that fit in a parcel."""
        members: list[tuple[Movable, list[Piece]]] = []
        nbytes = 0
        while self._queue:
            payload = self._queue[0][0]()
            if payload is not None:
                pieces, end = pieces_of(payload.tensors, nbytes)
                if members and (end > self._parcel_bytes or payload.origin != members[0][0].origin):
                    break
                members.append((payload, pieces))
                nbytes = end
            self._queued_bytes -= self._queue.popleft()[1]
        if not members:
            return
        self._make_way(nbytes)
        tensors = [tensor for payload, _ in members for tensor in payload.tensors]
        places = [piece for _, pieces in members for piece in pieces]
        host, transfer = self._transport.send(tensors, places, nbytes, members[0][0].origin)
        transfer.booking = Booking(self._ledger, buffer_bytes=nbytes)
        self._unread_bytes += nbytes
        on_host = Booking(self._ledger, host_bytes=nbytes)
        number = len(self._sent)
        parcel = Parcel(number, host, nbytes, transfer, on_host, self._orphans, self._transport.recycle)
        for payload, pieces in members:
            payload.move(parcel, pieces, Booking(self._ledger, moved_bytes=payload.saved_bytes))
        self._sent.append(ref(parcel))
        self._leaving.append(ref(parcel))

    def _make_way(self, nbytes: int) -> None:
        """Let go of what has been sent first, if more would be on its way than is allowed."""
        alive = [parcel for reference in self._leaving if (parcel := reference()) is not None]
        leaving = deque(parcel for parcel in alive if parcel.transfer is not None and not parcel.transfer.inbound)
        nbytes += sum(parcel.nbytes for parcel in leaving)
        while leaving and nbytes > self._under_way * self._parcel_bytes:
            nbytes -= leaving[0].nbytes
            self._let_go(leaving.popleft())
        self._leaving = deque(ref(parcel) for parcel in leaving)

    def _fetch(self, parcel: Parcel) -> Transfer:
        transfer = self._transport.bring(parcel.host, parcel.nbytes, parcel.origin)
        transfer.booking = Booking(self._ledger, buffer_bytes=parcel.nbytes)
        parcel.transfer = transfer
        self._unread_bytes += parcel.nbytes
        return transfer

    def _look_ahead(self, number: int, missed: bool) -> None:
        """Fetch the parcels before this one as far as there is room: in backward, in reverse order.

        Args:
            number: The parcel that is read; one more than the last for what has never left the device.
            missed: Whether it had to be fetched now.
        """
        task = torch._C._current_graph_task_id()
        if task < 0:
            return  # the forward pass asks for a mask
        # An old parcel that many read (a residual stream's) does not say where the pass is; one that it meets unawares
        # further on does.
        if task != self._pass or (missed and number > self._next):
            self._pass, self._next = task, number - 1
        while self._next >= 0:
            parcel = self._sent[self._next]()
            if parcel is not None and parcel.transfer is None:
                if not self._has_room(parcel.nbytes):
                    return
                try:
                    self._fetch(parcel)
                except torch.OutOfMemoryError:
                    return  # it is fetched when it is needed: by then others have gone
            self._next -= 1

    def _has_room(self, nbytes: int) -> bool:
        if not self._unread_bytes or self._unread_bytes + nbytes <= self._under_way * self._parcel_bytes:
            return True
        self._ledger.settle()
        return self._places.device_bytes(self._ledger.live_saved_bytes) + nbytes <= self._limit_bytes

    def _note_read(self, parcel: Parcel, transfer: Transfer) -> None:
        """Let go of what has been read longest ago: its graph is kept, or something else in its parcel waits."""
        self._mark_read(transfer)
        self._recent[parcel.number] = ref(parcel)
        self._recent.move_to_end(parcel.number)
        while len(self._recent) > self._under_way:
            _, reference = self._recent.popitem(last=False)
            oldest = reference()
            if oldest is not None:
                self._let_go(oldest)

    def _let_go(self, parcel: Parcel) -> None:
        """Free a parcel's memory on the device; the host has it."""
        if parcel.transfer is not None:
            self._transport.finish(parcel.transfer)
            self._mark_read(parcel.transfer)
            parcel.transfer = None

    def _bury(self) -> None:
        """Let go of copies whose parcel is dead."""
        while self._orphans:
            transfer = self._orphans.popleft()
            self._transport.finish(transfer)
            self._mark_read(transfer)

    def _mark_read(self, transfer: Transfer) -> None:
        if transfer.unread:
            transfer.unread = False
            self._unread_bytes -= transfer.buffer.nbytes

    def _refuse(self, found: str) -> NoReturn:
        wanted = self._transport.device_type
        raise ActMemError(
            f"offload moves packed tensors from a {wanted.upper()} device to the host, and {found}. Train on such a "
            f"device (Trainer(accelerator={'gpu' if wanted == 'cuda' else wanted!r})), or set offload=False."
        )
