"""The pair of hooks: autograd's saved tensor in, a handle out; and back."""

from __future__ import annotations

from time import perf_counter_ns

import torch
from torch import Tensor, UntypedStorage, nn

from lightning_actmem_kernels import CodecSpec, Layout, encode

from .borrowed import Borrowed
from .handle import Handle, Kept, Payload
from .identify import Codecs, Verdict, identify, is_weight
from .ledger import BORROWED, Charge, Ledger
from .operation import OperationTracker
from .scope import LayerScope
from .share import SharedStorages, StoredStorage
from .site import Site, SiteTable

_IDENTITY = CodecSpec("identity", bits=32)
_TENSOR_TYPES = (Tensor, nn.Parameter)
# A small view by reference keeps its whole storage alive; from this many times its own size on, it is copied instead.
_CLONE_FACTOR = 16


class SavedTensorHooks:
    """Packs and unpacks for one engine.

    Args:
        tracker: Tells the running operation.
        scope: Tells the running module call.
        sites: Names the places that save tensors.
        ledger: Books every byte.
        codecs: The codecs for float activations.
        backend: Kernel backend, or ``None`` for the fastest.
        min_elements: Smaller tensors stay as they are.
    """

    def __init__(
        self,
        tracker: OperationTracker,
        scope: LayerScope,
        sites: SiteTable,
        ledger: Ledger,
        codecs: Codecs,
        backend: str | None,
        min_elements: int,
    ) -> None:
        self._tracker = tracker
        self._scope = scope
        self._sites = sites
        self._ledger = ledger
        self._codecs = codecs
        self._backend = backend
        self._min_elements = min_elements
        self._borrowed = Borrowed()
        self._borrowed_seen: set[int] = set()
        self._shared = SharedStorages()
        self._noise = 0

    def start_step(self, borrowed: Borrowed, noise: int) -> None:
        """Begin a step.

        Args:
            borrowed: The storages of the model and the batch.
            noise: 64-bit mix of seed, rank and step.
        """
        self._borrowed = borrowed
        self._noise = noise
        self._borrowed_seen.clear()
        self._shared.clear()
        self._sites.start_step()
        self._ledger.start_step()

    def end_step(self) -> None:
        """Let go of everything that belongs to the step; handles live on with autograd's graph."""
        self._borrowed = Borrowed()
        self._shared.clear()

    @staticmethod
    def unpack(handle: Handle) -> Tensor:
        """Return the tensor that a handle stands for."""
        return handle.restore()

    def pack(self, tensor: Tensor) -> Handle:
        """Store a tensor that autograd saves and return its handle."""
        storage = _storage(tensor)
        if storage is None:
            return self._keep_opaque(tensor)
        verdict = identify(
            tensor, storage._cdata, self._tracker, self._scope.frame, self._borrowed, self._codecs, self._min_elements
        )
        if verdict.kind in BORROWED:
            return self._keep_borrowed(tensor, storage, verdict)
        stored = self._shared[storage]
        handle = stored.find(tensor, exact=verdict.spec is None) if verdict.versioned else None
        if handle is not None:
            self._book(verdict, "shared")
            return handle
        spec, layout = self._plan(tensor, storage, verdict)
        if spec is None or layout is None:
            return self._keep(tensor, storage, stored, verdict)
        return self._encode(tensor, storage, stored, verdict, spec, layout)

    def _plan(
        self, tensor: Tensor, storage: UntypedStorage, verdict: Verdict
    ) -> tuple[CodecSpec | None, Layout | None]:
        """Choose the codec, or none where keeping the storage alive costs no more."""
        layout = Layout.of(tensor)
        if layout is None:
            return None, None
        spec = verdict.spec
        if spec is None and verdict.versioned and storage.nbytes() >= _CLONE_FACTOR * tensor.nbytes:
            spec = _IDENTITY
        elif (
            spec is not None and spec != _IDENTITY and spec.stored_bytes(layout.numel, tensor.dtype) >= storage.nbytes()
        ):
            spec = None
        return spec, layout

    def _keep_borrowed(self, tensor: Tensor, storage: UntypedStorage, verdict: Verdict) -> Handle:
        new_bytes = 0 if storage._cdata in self._borrowed_seen else storage.nbytes()
        self._borrowed_seen.add(storage._cdata)
        self._book(verdict, "exact", new_bytes, new_bytes)
        return Kept(tensor)

    def _keep(self, tensor: Tensor, storage: UntypedStorage, stored: StoredStorage, verdict: Verdict) -> Handle:
        raw, raw_bytes = self._raw_charge(storage, stored)
        held = stored.held_charge()
        saved_bytes = 0
        if held is None:
            saved_bytes = storage.nbytes()
            held = Charge(self._ledger, saved_bytes=saved_bytes)
        if verdict.versioned:
            stored.set_held_charge(held, tensor._version)
        self._book(verdict, "exact", raw_bytes, saved_bytes, raw_bytes // tensor.element_size())
        return Kept(tensor, verdict.versioned, (held, raw))

    def _encode(
        self,
        tensor: Tensor,
        storage: UntypedStorage,
        stored: StoredStorage,
        verdict: Verdict,
        spec: CodecSpec,
        layout: Layout,
    ) -> Handle:
        site = self._site(verdict)
        key = self._sites.noise_key(site, self._noise)
        start_ns = perf_counter_ns()
        tensors = encode(layout.flatten(tensor), spec, key=key, backend=self._backend)
        self._ledger.pack_ns += perf_counter_ns() - start_ns
        self._ledger.packed_on_cpu &= tensor.device.type == "cpu"
        raw, raw_bytes = self._raw_charge(storage, stored)
        saved_bytes = spec.stored_bytes(layout.numel, tensor.dtype)
        charges = Charge(self._ledger, saved_bytes=saved_bytes), raw
        payload = Payload(tensors, spec, layout.numel, tensor.dtype, key, self._backend, charges)
        self._ledger.record(
            site, verdict.kind, _label(spec), raw_bytes, saved_bytes, raw_bytes // tensor.element_size()
        )
        return stored.add(tensor, layout, payload)

    def _keep_opaque(self, tensor: Tensor) -> Handle:
        """Keep a tensor without a storage of its own (DTensor, sparse, nested); its bytes are its elements'."""
        operation = self._tracker.name() or "custom"
        nbytes = _opaque_bytes(tensor)
        if is_weight(tensor):
            self._book(Verdict(operation, "weight", "weight"), "exact", nbytes, nbytes)
            return Kept(tensor)
        charge = Charge(self._ledger, saved_bytes=nbytes, raw_bytes=nbytes)
        self._book(
            Verdict(operation, "result", "unsupported"), "exact", nbytes, nbytes, nbytes // tensor.element_size()
        )
        return Kept(tensor, charges=(charge,))

    def _raw_charge(self, storage: UntypedStorage, stored: StoredStorage) -> tuple[Charge, int]:
        charge = stored.raw_charge()
        if charge is not None:
            return charge, 0
        charge = Charge(self._ledger, raw_bytes=storage.nbytes())
        stored.set_raw_charge(charge)
        return charge, storage.nbytes()

    def _site(self, verdict: Verdict) -> Site:
        frame = self._scope.frame
        ordinal = frame.next_ordinal(verdict.operation, verdict.role)
        return self._sites.site(frame.layer, verdict.operation, verdict.role, ordinal)

    def _book(self, verdict: Verdict, codec: str, raw_bytes: int = 0, saved_bytes: int = 0, elements: int = 0) -> None:
        self._ledger.record(self._site(verdict), verdict.kind, codec, raw_bytes, saved_bytes, elements)


def _storage(tensor: Tensor) -> UntypedStorage | None:
    """Return the storage of a plain dense tensor, and ``None`` for everything else."""
    if type(tensor) not in _TENSOR_TYPES or tensor.layout is not torch.strided:
        return None
    if tensor.is_nested or tensor.is_quantized:
        return None
    return tensor.untyped_storage()


def _label(spec: CodecSpec) -> str:
    return "exact" if spec.codec == "identity" else f"{spec.codec}-{spec.bits}"


def _opaque_bytes(tensor: Tensor) -> int:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.numel() * tensor.element_size()
