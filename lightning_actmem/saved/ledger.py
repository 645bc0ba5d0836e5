"""The ledger: exact bytes of what is stored, and of what plain autograd would have kept alive."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from lightning_actmem_kernels import CodecSpec

from .site import Site
from .whereabouts import Whereabouts

#: Kept alive by somebody else, so reported beside the activations and not counted among them.
BORROWED = frozenset({"weight", "buffer", "input"})


class Charge:
    """Bytes that live as long as this object does.

    Args:
        ledger: Where they are booked.
        saved_bytes: Bytes stored.
        raw_bytes: Bytes that plain autograd would keep alive.
        waiting_bytes: Bytes of a tensor that waits for its code.
        raw: The charge for the raw bytes, if they are booked already: it lives as long as this one at least.
    """

    __slots__ = ("__weakref__", "_ledger", "_raw", "raw_bytes", "saved_bytes", "waiting_bytes")

    def __init__(
        self,
        ledger: Ledger,
        saved_bytes: int = 0,
        raw_bytes: int = 0,
        waiting_bytes: int = 0,
        raw: Charge | None = None,
    ) -> None:
        self.saved_bytes = saved_bytes
        self.raw_bytes = raw_bytes
        self.waiting_bytes = waiting_bytes
        self._ledger = ledger
        self._raw = raw
        if ledger._released:
            ledger.settle()
        ledger.live_saved_bytes += saved_bytes
        ledger.live_raw_bytes += raw_bytes
        ledger.live_waiting_bytes += waiting_bytes

    def raw_alone(self) -> Charge:
        """Return the charge for the raw bytes and nothing else; it is made where it is missing."""
        if self._raw is None:
            if not self.saved_bytes:
                return self
            self._raw = Charge(self._ledger)
            self._raw.raw_bytes, self.raw_bytes = self.raw_bytes, 0
        return self._raw

    def __del__(self) -> None:
        # A deque's append is atomic: this may run in autograd's threads, or in the garbage collector at any point.
        self._ledger._released.append((self.saved_bytes, self.raw_bytes, self.waiting_bytes))


@dataclass(slots=True)
class SiteBytes:
    """What one site stored in a step.

    Args:
        site: The site.
        kind: ``"packed"``, or why the tensor stays exact (``"attention"``, ``"loss"``, ``"weight"``, ...).
        codec: Codec and bits (``"uniform-4"``), or ``"exact"``.
        tensors: Number of tensors saved, shared ones included.
        raw_bytes: Bytes of the storages that plain autograd would have kept alive, each storage at its first site.
        saved_bytes: Bytes stored instead.
        elements: Elements of the storages in ``raw_bytes``.
        step: Number of that step.
    """

    site: Site
    kind: str
    codec: str
    tensors: int = 0
    raw_bytes: int = 0
    saved_bytes: int = 0
    elements: int = 0
    step: int = -1

    def enter(self, step: int, spec: CodecSpec, saved_bytes: int) -> None:
        """Book what one of the tensors of a step takes, when it is known late; a later step has the row for itself."""
        if self.step == step:
            self.codec = spec.label
            self.saved_bytes += saved_bytes

    def take_back(self, saved_bytes: int, ledger: Ledger) -> None:
        """Unbook bytes that one of the tensors takes no more, unless a later step has the row."""
        if self.step == ledger._step:
            self.saved_bytes -= saved_bytes


@dataclass
class Ledger:
    """Counts bytes as they are stored and as they die.

    Args:
        live_saved_bytes: Activation bytes stored now.
        live_raw_bytes: Bytes that plain autograd would keep alive now for the same graph.
        live_waiting_bytes: Bytes of tensors that wait for their code now (see `Undecided`).
        pack_ns: Host time spent in encoding on the CPU since the step began, in nanoseconds.
        packed_on_cpu: Whether ``pack_ns`` covers everything packed in the step (device work would need a
            synchronisation to be timed).
        rows: Bytes by site in the order of the forward pass; the next step uses the rows again.
        whereabouts: Which of the stored bytes are on the host, where an offload moves them.
    """

    live_saved_bytes: int = 0
    live_raw_bytes: int = 0
    live_waiting_bytes: int = 0
    pack_ns: int = 0
    packed_on_cpu: bool = True
    rows: list[SiteBytes] = field(default_factory=list)
    whereabouts: Whereabouts | None = None
    # As of the last settling: from then on the live figures have only grown.
    _peak_saved_bytes: int = 0
    _peak_raw_bytes: int = 0
    _peak_waiting_bytes: int = 0
    # Saved, raw and waiting bytes; one number where the same were saved and raw.
    _released: deque[tuple[int, int, int] | int] = field(default_factory=deque)
    # Rows of all steps: to make them afresh in every step takes twice the time, and work for the garbage collector.
    _rows: dict[tuple[str, str, str, int], SiteBytes] = field(default_factory=dict)
    _step: int = 0

    @property
    def sites(self) -> dict[Site, SiteBytes]:
        """Bytes by site in the order of the forward pass, as they are now."""
        return {row.site: replace(row) for row in self.rows}

    @property
    def peak_saved_bytes(self) -> int:
        """The largest ``live_saved_bytes`` since the step began."""
        return max(self._peak_saved_bytes, self.live_saved_bytes)

    @property
    def peak_raw_bytes(self) -> int:
        """The largest ``live_raw_bytes`` since the step began."""
        return max(self._peak_raw_bytes, self.live_raw_bytes)

    @property
    def peak_waiting_bytes(self) -> int:
        """The largest ``live_waiting_bytes`` since the step began."""
        return max(self._peak_waiting_bytes, self.live_waiting_bytes)

    def start_step(self) -> None:
        """Begin a new step: peaks start from what is alive, sites from nothing."""
        self.settle()
        self._peak_saved_bytes = self.live_saved_bytes
        self._peak_raw_bytes = self.live_raw_bytes
        self._peak_waiting_bytes = self.live_waiting_bytes
        if self.whereabouts is not None:
            self.whereabouts.start_step(self.live_saved_bytes)
        self.pack_ns = 0
        self.packed_on_cpu = True
        self.rows.clear()
        self._step += 1

    def settle(self) -> None:
        """Bring the live figures up to date with what has died."""
        self._peak_saved_bytes = self.peak_saved_bytes
        self._peak_raw_bytes = self.peak_raw_bytes
        self._peak_waiting_bytes = self.peak_waiting_bytes
        if self.whereabouts is not None:
            self.whereabouts.note(self.live_saved_bytes)
            self.whereabouts.settle()
        saved_bytes = raw_bytes = waiting_bytes = 0
        for _ in range(len(self._released)):  # as many as there are: others may follow from other threads
            try:
                released = self._released.popleft()
            except IndexError:  # another thread settles too
                break
            if isinstance(released, int):
                saved_bytes += released
                raw_bytes += released
            else:
                saved_bytes += released[0]
                raw_bytes += released[1]
                waiting_bytes += released[2]
        self.live_saved_bytes -= saved_bytes
        self.live_raw_bytes -= raw_bytes
        self.live_waiting_bytes -= waiting_bytes

    def record(
        self,
        site: Site | tuple[str, str, str, int],
        kind: str,
        codec: str,
        raw_bytes: int,
        saved_bytes: int,
        elements: int,
    ) -> SiteBytes:
        """Book one saved tensor on its site (or the site's fields) and return the site's row of this step."""
        row = self._rows.get(site)
        if row is None:
            row = self._rows[site] = SiteBytes(Site(*site), kind, codec)
        if row.step == self._step:
            row.tensors += 1
            row.raw_bytes += raw_bytes
            row.saved_bytes += saved_bytes
            row.elements += elements
            return row
        self.rows.append(row)
        row.step = self._step
        row.kind = kind
        row.codec = codec
        row.tensors = 1
        row.raw_bytes = raw_bytes
        row.saved_bytes = saved_bytes
        row.elements = elements
        return row
