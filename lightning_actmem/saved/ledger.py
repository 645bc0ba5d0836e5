"""The ledger: exact bytes of what is stored, and of what plain autograd would have kept alive."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .site import Site

#: Kept alive by somebody else, so reported beside the activations and not counted among them.
BORROWED = frozenset({"weight", "buffer", "input"})


class Charge:
    """Bytes that live as long as this object does."""

    __slots__ = ("__weakref__", "_ledger", "raw_bytes", "saved_bytes", "waiting_bytes")

    def __init__(self, ledger: Ledger, saved_bytes: int = 0, raw_bytes: int = 0, waiting_bytes: int = 0) -> None:
        self.saved_bytes = saved_bytes
        self.raw_bytes = raw_bytes
        self.waiting_bytes = waiting_bytes
        self._ledger = ledger
        ledger._add(saved_bytes, raw_bytes, waiting_bytes)

    def __del__(self) -> None:
        # A deque's append is atomic: this may run in autograd's threads, or in the garbage collector at any point.
        self._ledger._released.append((self.saved_bytes, self.raw_bytes, self.waiting_bytes))


@dataclass
class SiteBytes:
    """What one site stored in a step.

    Args:
        kind: ``"packed"``, or why the tensor stays exact (``"attention"``, ``"loss"``, ``"weight"``, ...).
        codec: Codec and bits (``"uniform-4"``), or ``"exact"``.
        tensors: Number of tensors saved, shared ones included.
        raw_bytes: Bytes of the storages that plain autograd would have kept alive, each storage at its first site.
        saved_bytes: Bytes stored instead.
        elements: Elements of the storages in ``raw_bytes``.
    """

    kind: str
    codec: str
    tensors: int = 0
    raw_bytes: int = 0
    saved_bytes: int = 0
    elements: int = 0


@dataclass
class Ledger:
    """Counts bytes as they are stored and as they die.

    Args:
        live_saved_bytes: Activation bytes stored now.
        live_raw_bytes: Bytes that plain autograd would keep alive now for the same graph.
        peak_saved_bytes: The largest ``live_saved_bytes`` since the step began.
        peak_raw_bytes: The largest ``live_raw_bytes`` since the step began.
        live_waiting_bytes: Bytes of tensors that wait for their code now (see `Undecided`).
        peak_waiting_bytes: The largest ``live_waiting_bytes`` since the step began.
        pack_ns: Host time spent in encoding on the CPU since the step began, in nanoseconds.
        packed_on_cpu: Whether ``pack_ns`` covers everything packed in the step (device work would need a
            synchronisation to be timed).
        sites: Bytes by site in the order of the forward pass.
    """

    live_saved_bytes: int = 0
    live_raw_bytes: int = 0
    peak_saved_bytes: int = 0
    peak_raw_bytes: int = 0
    live_waiting_bytes: int = 0
    peak_waiting_bytes: int = 0
    pack_ns: int = 0
    packed_on_cpu: bool = True
    sites: dict[Site, SiteBytes] = field(default_factory=dict)
    _released: deque[tuple[int, int, int]] = field(default_factory=deque)

    def start_step(self) -> None:
        """Begin a new step: peaks start from what is alive, sites from nothing."""
        self.settle()
        self.peak_saved_bytes = self.live_saved_bytes
        self.peak_raw_bytes = self.live_raw_bytes
        self.peak_waiting_bytes = self.live_waiting_bytes
        self.pack_ns = 0
        self.packed_on_cpu = True
        self.sites = {}

    def settle(self) -> None:
        """Bring the live figures up to date with what has died."""
        while self._released:
            saved_bytes, raw_bytes, waiting_bytes = self._released.popleft()
            self.live_saved_bytes -= saved_bytes
            self.live_raw_bytes -= raw_bytes
            self.live_waiting_bytes -= waiting_bytes

    def record(self, site: Site, kind: str, codec: str, raw_bytes: int, saved_bytes: int, elements: int) -> SiteBytes:
        """Book one saved tensor on its site and return the site's row."""
        row = self.sites.get(site)
        if row is None:
            row = self.sites[site] = SiteBytes(kind, codec)
        row.tensors += 1
        row.raw_bytes += raw_bytes
        row.saved_bytes += saved_bytes
        row.elements += elements
        return row

    def _add(self, saved_bytes: int, raw_bytes: int, waiting_bytes: int) -> None:
        if self._released:
            self.settle()
        self.live_saved_bytes += saved_bytes
        self.live_raw_bytes += raw_bytes
        self.live_waiting_bytes += waiting_bytes
        if self.live_waiting_bytes > self.peak_waiting_bytes:
            self.peak_waiting_bytes = self.live_waiting_bytes
        if self.live_saved_bytes > self.peak_saved_bytes:
            self.peak_saved_bytes = self.live_saved_bytes
        if self.live_raw_bytes > self.peak_raw_bytes:
            self.peak_raw_bytes = self.live_raw_bytes
