"""One storage, one copy: what is already stored of each storage in this step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .handle import Handle, Kept, Packed, PackedCompact, Payload
from .ledger import Charge

if TYPE_CHECKING:
    from torch import UntypedStorage

    from lightning_actmem_kernels import Layout


@dataclass(frozen=True)
class _Segment:
    """A payload of the elements from ``start`` to ``stop`` of a storage, as they were at ``version``."""

    version: int
    dtype: object
    start: int
    stop: int
    payload: ReferenceType[Payload]


@dataclass(frozen=True)
class _Compact:
    """A payload of one strided view with gaps."""

    version: int
    dtype: object
    geometry: tuple[int, tuple[int, ...], tuple[int, ...]]
    payload: ReferenceType[Payload]
    layout: Layout


class StoredStorage:
    """What is stored of one storage.

    The weak reference keeps the storage's identity from being reused by another one, without keeping its memory:
    an address alone gives wrong gradients as soon as the allocator hands it out again.
    """

    __slots__ = ("_compacts", "_held", "_raw", "_segments", "_weak")

    def __init__(self, storage: UntypedStorage) -> None:
        self._weak = StorageWeakRef(storage)
        self._raw: ReferenceType[Charge] | None = None
        self._held: tuple[int, ReferenceType[Charge]] | None = None
        self._segments: list[_Segment] = []
        self._compacts: list[_Compact] = []

    def raw_charge(self) -> Charge | None:
        """The charge for the memory that plain autograd would keep alive, while something of it is stored."""
        return None if self._raw is None else self._raw()

    def set_raw_charge(self, charge: Charge) -> None:
        """Note that charge; whoever stores something of the storage holds it."""
        self._raw = ref(charge)

    def held_charge(self, version: int | None = None) -> Charge | None:
        """The charge for keeping the storage itself alive, if somebody does (at that version)."""
        if self._held is None or (version is not None and self._held[0] != version):
            return None
        return self._held[1]()

    def set_held_charge(self, charge: Charge, version: int) -> None:
        """Note that the storage itself is kept alive."""
        self._held = (version, ref(charge))

    def find(self, tensor: Tensor, exact: bool) -> Handle | None:
        """Return a handle of the tensor from what is stored already.

        Args:
            tensor: The tensor that autograd saves.
            exact: Whether a rounded copy will not do.

        Returns:
            The handle, or ``None`` when nothing stored yields the tensor.
        """
        version, dtype, start = tensor._version, tensor.dtype, int(tensor.storage_offset())
        size, stride = tuple(tensor.shape), tensor.stride()
        if (held := self.held_charge(version)) is not None:
            return Kept(tensor, charges=(held, self.raw_charge()))
        if exact and not self._lossless():
            return None
        stop = start + extent(size, stride)
        for segment in self._segments:
            payload = segment.payload()
            inside = segment.start <= start and stop <= segment.stop
            if payload is not None and inside and (segment.version, segment.dtype) == (version, dtype):
                return Packed(payload, size, stride, start - segment.start)
        for compact in self._compacts:
            payload = compact.payload()
            same = (compact.version, compact.dtype, compact.geometry) == (version, dtype, (start, size, stride))
            if payload is not None and same:
                return PackedCompact(payload, compact.layout)
        return None

    def _lossless(self) -> bool:
        stored = [entry.payload() for entry in self._segments] + [entry.payload() for entry in self._compacts]
        return bool(stored) and all(payload is None or payload.spec.lossless for payload in stored)

    def add(self, tensor: Tensor, layout: Layout, payload: Payload) -> Handle:
        """Note a new payload of the tensor and return its handle."""
        version, dtype, start = tensor._version, tensor.dtype, int(tensor.storage_offset())
        size, stride = tuple(tensor.shape), tensor.stride()
        if layout.dense:
            self._segments.append(_Segment(version, dtype, start, start + layout.numel, ref(payload)))
            return Packed(payload, size, stride, 0)
        self._compacts.append(_Compact(version, dtype, (start, size, stride), ref(payload), layout))
        return PackedCompact(payload, layout)


class SharedStorages:
    """The storages of which something has been stored in this step."""

    def __init__(self) -> None:
        self._entries: dict[int, StoredStorage] = {}

    def __getitem__(self, storage: UntypedStorage) -> StoredStorage:
        entry = self._entries.get(storage._cdata)
        if entry is None:
            entry = self._entries[storage._cdata] = StoredStorage(storage)
        return entry

    def clear(self) -> None:
        """Forget everything; payloads live on with their handles."""
        self._entries.clear()


def extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the number of elements from a view's first to its last, inclusive."""
    if 0 in size:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
