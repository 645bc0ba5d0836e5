"""Where stored bytes are: on the device, on the host, or in between."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ledger import Ledger


class Whereabouts:
    """Counts what an offload moves, beside the ledger's count of what is stored.

    Attributes:
        live_moved_bytes: Stored bytes that lie in parcels now, wherever these are.
        live_buffer_bytes: Bytes that parcels take on the device now.
        live_host_bytes: Bytes that parcels take on the host now.
    """

    def __init__(self) -> None:
        self.live_moved_bytes = 0
        self.live_buffer_bytes = 0
        self.live_host_bytes = 0
        self._peak_device_bytes = 0
        self._peak_host_bytes = 0
        self._released: deque[tuple[int, int, int]] = deque()

    def device_bytes(self, saved_bytes: int) -> int:
        """Return the bytes on the device now, of so many stored."""
        return saved_bytes - self.live_moved_bytes + self.live_buffer_bytes

    def peak_device_bytes(self, saved_bytes: int) -> int:
        """Return the largest number of bytes on the device since the step began, with so many stored now."""
        return max(self._peak_device_bytes, self.device_bytes(saved_bytes))

    @property
    def peak_host_bytes(self) -> int:
        """The largest ``live_host_bytes`` since the step began."""
        return max(self._peak_host_bytes, self.live_host_bytes)

    def start_step(self, saved_bytes: int) -> None:
        """Begin a new step: peaks start from what is alive."""
        self._peak_device_bytes = self.device_bytes(saved_bytes)
        self._peak_host_bytes = self.live_host_bytes

    def note(self, saved_bytes: int) -> None:
        """Take down the peaks, before anything falls."""
        self._peak_device_bytes = self.peak_device_bytes(saved_bytes)
        self._peak_host_bytes = self.peak_host_bytes

    def settle(self) -> None:
        """Bring the live figures up to date with what has died."""
        while self._released:
            try:
                moved_bytes, buffer_bytes, host_bytes = self._released.popleft()
            except IndexError:  # another thread settles too
                break
            self.live_moved_bytes -= moved_bytes
            self.live_buffer_bytes -= buffer_bytes
            self.live_host_bytes -= host_bytes


class Booking:
    """Bytes in a place, as long as this object lives.

    Args:
        ledger: The ledger; it has `Whereabouts`.
        moved_bytes: Stored bytes that lie in a parcel.
        buffer_bytes: Bytes of a parcel on the device.
        host_bytes: Bytes of a parcel on the host.
    """

    __slots__ = ("_bytes", "_places")

    def __init__(self, ledger: Ledger, moved_bytes: int = 0, buffer_bytes: int = 0, host_bytes: int = 0) -> None:
        assert ledger.whereabouts is not None, "an offload has set it"
        self._places = ledger.whereabouts
        self._bytes = moved_bytes, buffer_bytes, host_bytes
        ledger.settle()  # the peaks are taken down: what moves is no longer where it was
        self._places.live_moved_bytes += moved_bytes
        self._places.live_buffer_bytes += buffer_bytes
        self._places.live_host_bytes += host_bytes

    def __del__(self) -> None:
        # A deque's append is atomic: this may run in autograd's threads, or in the garbage collector at any point.
        self._places._released.append(self._bytes)
