"""One storage, one copy: what is already stored of each storage in this step."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import UntypedStorage

from .geometry import Geometry, extent
from .handle import Handle, Kept, Packed, PackedCompact, Reshaped
from .ledger import Charge
from .own_derivative import OwnDerivative
from .packed_first import PackedFirst
from .payload import AnyPayload

if TYPE_CHECKING:
    from lightning_actmem_kernels import Layout

    from .derive import Outcome
    from .derived import Derived


class _Segment(NamedTuple):
    """A payload of the elements from ``start`` to ``stop`` of a storage, as they were at ``version``."""

    version: int
    dtype: torch.dtype
    start: int
    stop: int
    payload: ReferenceType[AnyPayload]


class _Compact(NamedTuple):
    """A payload of one strided view with gaps."""

    geometry: Geometry
    payload: ReferenceType[AnyPayload]
    layout: Layout


_NO_OUTCOMES: Mapping[int, Outcome] = MappingProxyType({})


class StoredStorage:
    """What is stored of one storage, and how its contents came about.

    Attributes:
        is_empty: Whether nothing has been stored of it yet.
        outcomes: How its contents came about, by version.
    """

    __slots__ = ("_compacts", "_copies", "_held", "_kept", "_raw", "_segments", "is_empty", "outcomes")

    def __init__(self) -> None:
        self.is_empty = True
        self.outcomes: Mapping[int, Outcome] = _NO_OUTCOMES
        self._raw: ReferenceType[Charge] | ReferenceType[PackedFirst] | None = None
        self._held: ReferenceType[Charge] | None = None
        self._kept: ReferenceType[Kept] | None = None
        self._segments: tuple[_Segment, ...] = ()  # tuples: most storages have none or one of each
        self._compacts: tuple[_Compact, ...] = ()
        self._copies: tuple[tuple[Geometry, ReferenceType[Handle]], ...] = ()

    def raw_charge(self) -> Charge | None:
        """The charge for the memory that plain autograd would keep alive, while something of it is stored."""
        holder = None if self._raw is None else self._raw()
        if isinstance(holder, PackedFirst):
            holder = holder.raw
            self._raw = ref(holder)
        return holder

    def set_raw_charge(self, charge: Charge) -> None:
        """Note that charge; whoever stores something of the storage holds it."""
        self._raw = ref(charge)

    def held_charge(self) -> Charge | None:
        """The charge for keeping the storage itself alive, if somebody does."""
        return None if self._held is None else self._held()

    def add_kept(self, handle: Kept) -> None:
        """Note that a handle keeps the storage itself alive."""
        self.is_empty = False
        if handle.charge is not None:
            self._held = ref(handle.charge)
            if self.raw_charge() is None:
                self._raw = self._held
        if handle.versioned:
            self._kept = ref(handle)
        for segment in self._segments:
            payload = segment.payload()
            if isinstance(payload, (PackedFirst, OwnDerivative)):
                payload.give_way(handle)

    def add_packed(self, handle: PackedFirst) -> None:
        """Note a payload that holds the bytes of the storage too."""
        self.is_empty = False
        self._raw = ref(handle)
        stop = handle.start + handle.numel
        self._segments += (_Segment(handle.version, handle.dtype, handle.start, stop, ref(handle)),)

    def add_copy(self, geometry: Geometry, handle: Handle) -> None:
        """Note that a handle stands for a contiguous copy of a view, in another shape."""
        self.is_empty = False
        self._copies += ((geometry, ref(handle)),)

    def find_values(self, geometry: Geometry, least_bits: int) -> Handle | None:
        """Return a handle of a view's values in at least this quality, whatever its strides."""
        handle = self.find(geometry, least_bits)
        for known, copy in self._copies:
            original = copy()
            if handle is None and known == geometry and original is not None and original.bits >= least_bits:
                handle = Reshaped(original, geometry.size)
        return handle

    def find(self, geometry: Geometry, least_bits: int, by_value: bool = False) -> Handle | None:
        """Return a handle of a view of the storage from what is stored already.

        Args:
            geometry: The view.
            least_bits: Quality that the handle must have at least (see `AnyPayload`).
            by_value: Whether a reference to the tensor itself will not do.

        Returns:
            The handle, or ``None`` when nothing stored yields the view.
        """
        kept = None if self._kept is None or by_value else self._kept()
        if kept is not None and (handle := kept.view(geometry)) is not None:
            return handle
        version, dtype, start = geometry.version, geometry.dtype, geometry.start
        stop = start + extent(geometry.size, geometry.stride)
        for segment in self._segments:
            payload = segment.payload()
            inside = segment.start <= start and stop <= segment.stop
            good = payload is not None and payload.bits >= least_bits
            if payload is not None and good and inside and (segment.version, segment.dtype) == (version, dtype):
                return Packed(payload, geometry.size, geometry.stride, start - segment.start)
        for compact in self._compacts:
            payload = compact.payload()
            if payload is not None and compact.geometry == geometry and payload.bits >= least_bits:
                return PackedCompact(payload, compact.layout)
        return None

    def add(self, geometry: Geometry, layout: Layout, payload: AnyPayload) -> Handle:
        """Note a new payload of a view and return its handle."""
        self.is_empty = False
        if layout.dense:
            stop = geometry.start + layout.numel
            self._segments += (_Segment(geometry.version, geometry.dtype, geometry.start, stop, ref(payload)),)
            return Packed(payload, geometry.size, geometry.stride, 0)
        self._compacts += (_Compact(geometry, ref(payload), layout),)
        return PackedCompact(payload, layout)

    def add_outcome(self, version: int, outcome: Outcome) -> None:
        """Note how its contents came about."""
        self.outcomes = {**self.outcomes, version: outcome}

    def add_derived(self, version: int, dtype: torch.dtype, derived: Derived) -> None:
        """Note that the whole storage can be computed; ``derived`` lives as long as somebody holds a handle of it."""
        self.is_empty = False
        self._segments += (_Segment(version, dtype, 0, derived.numel, ref(derived)),)


class SharedStorages:
    """The storages of which something has been stored in this step.

    A weak reference to each keeps its identity from being reused by another storage, without keeping its memory: an
    address alone gives wrong gradients as soon as the allocator hands it out again. Where all that is stored is one
    tensor by reference, its handle does the same. An entry is made only when there is more to note than one handle.
    """

    def __init__(self) -> None:
        #: By identity: an entry, or the handle of all that is stored of the storage, if it still lives.
        self.noted: dict[int, StoredStorage | ReferenceType[Kept | PackedFirst]] = {}
        self._entries: list[StoredStorage] = []
        self._weak: list[Any] = []  # plain numbers: a StorageWeakRef for each costs 0.4 us more
        self._free_weak_ref: Any = UntypedStorage._free_weak_ref  # at exit the class may go first

    def __getitem__(self, storage: UntypedStorage) -> StoredStorage:
        noted = self.noted.get(storage._cdata)
        if isinstance(noted, StoredStorage):
            return noted
        self._weak.append(storage._weak_ref())
        entry = self.noted[storage._cdata] = StoredStorage()
        self._entries.append(entry)
        first = None if noted is None else noted()
        if isinstance(first, PackedFirst):
            entry.add_packed(first)
        elif first is not None:
            entry.add_kept(first)
        return entry

    def is_known(self, identity: int) -> bool:
        """Whether anything has been noted of the storage of that identity."""
        noted = self.noted.get(identity)
        return noted is not None and (isinstance(noted, StoredStorage) or noted() is not None)

    def is_first(self, storage: UntypedStorage) -> bool:
        """Whether nothing that is stored of a storage holds its bytes yet."""
        noted = self.noted.get(storage._cdata)
        if isinstance(noted, StoredStorage):
            return noted.raw_charge() is None
        return noted is None or noted() is None

    def add_first(self, identity: int, handle: Kept) -> None:
        """Note the first that is stored of the storage of that identity: a tensor by reference."""
        self.noted[identity] = ref(handle)

    def add_packed(self, storage: UntypedStorage, handle: PackedFirst) -> None:
        """Note the first payload of a storage."""
        identity = storage._cdata
        noted = self.noted.get(identity)
        if isinstance(noted, StoredStorage):
            noted.add_packed(handle)
            return
        self._weak.append(storage._weak_ref())  # the payload does not keep the storage
        self.noted[identity] = ref(handle)

    def clear(self) -> None:
        """Forget everything; payloads live on with their handles."""
        for entry in self._entries:
            entry.outcomes = _NO_OUTCOMES  # recipes and storages refer to each other
        self._entries.clear()
        self.noted.clear()
        for weak in self._weak:
            self._free_weak_ref(weak)
        self._weak.clear()

    def __del__(self) -> None:
        self.clear()
