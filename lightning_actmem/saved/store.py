"""Where tensors are stored: kept by reference or encoded, shared, and booked byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from time import perf_counter_ns
from weakref import ref

import torch
from torch import Tensor, UntypedStorage

from lightning_actmem_kernels import CodecSpec, Layout, encode

from .batch_norm import signs_behind
from .declared import Declared
from .deferred import Deferrals, Deferred
from .derived import Derived
from .extent import code_bytes, fills, has_rows
from .geometry import Geometry
from .handle import Handle, Kept, Packed, PoolIndices, Stand
from .identify import MASK, POSITIONS, Verdict
from .kept_first import KeptFirst
from .ledger import Charge, Ledger
from .offload import Offload
from .own_derivative import OwnDerivative, OwnDerivatives, may_wait
from .packed_first import PackedFirst
from .parcel import Movable
from .payload import AnyPayload, DecodeCache, Payload
from .probe import ProbePayload, Watch, may_fold
from .scope import LayerScope
from .share import SharedStorages, StoredStorage
from .site import Place, Site, SiteTable
from .undecided import Undecided, Waiting
from .weights import Recast

#: Encodes a flat segment; returns what stands for it and its bytes.
Encode = Callable[[Tensor, CodecSpec], tuple[Payload, int]]
#: Stores a flat segment, its codec and its tensor's shape given, in several parts; ``None`` leaves it whole.
Split = Callable[[Tensor, CodecSpec, tuple[int, ...], Callable[[torch.dtype], Encode]], "tuple[AnyPayload, int] | None"]
IDENTITY = CodecSpec("identity")
# A view by reference keeps its whole storage alive; from this many times its own size on, it is copied instead.
_CLONE_FACTOR = 16


class Store:
    """Stores tensors for one step after another.

    Args:
        scope: Tells the running module call.
        ledger: Books every byte.
        backend: Kernel backend, or ``None`` for the fastest.
    """

    def __init__(self, scope: LayerScope, ledger: Ledger, backend: str | None) -> None:
        self.shared = SharedStorages()
        self.deferred = Deferrals()
        self._scope = scope
        self._sites = SiteTable()
        self._ledger = ledger
        self._backend = backend
        self.cache = DecodeCache()
        #: The codec of single sites, where somebody has chosen one; ``None`` keeps the tensor as it is.
        self.plan: Mapping[Site, CodecSpec | None] = {}
        #: Who wants to know of the tensors that a plan may speak of.
        self.watch: Watch | None = None
        #: How tensors are divided among several codecs, where somebody wants that.
        self.split: Split | None = None
        #: Whether a ReLU's sign leaves the input of a batch norm its bits, instead of taking one away.
        self.keeps_width = False
        #: Moves encoded segments to the host, if the settings ask for it.
        self.offload: Offload | None = None
        self._borrowed_seen: set[int] = set()
        self._waiting = Waiting()
        self.own_derivatives = OwnDerivatives()
        self._noise = 0
        self._encodes_at_once = False  # nobody has a say, beside the verdict

    def start_step(self, noise: int) -> None:
        """Begin a step with this mix of seed, rank and step."""
        self._noise = noise
        self._encodes_at_once = not (self.plan or self.watch or self.split or self.offload)
        self._borrowed_seen.clear()
        self.shared.clear()
        self._sites.start_step()
        if self.offload is not None:
            self.offload.start_step()
        self._ledger.start_step()

    def end_step(self) -> None:
        """Let go of everything that belongs to the step; handles live on with autograd's graph."""
        try:
            self.deferred.settle(everything=True)
            self._waiting.settle()
            self.own_derivatives.settle()
            if self.offload is not None:
                self.offload.end_step()
        finally:
            self.deferred.waiting = []  # who is still waiting is encoded when backward asks
            self.own_derivatives.clear()
            self.shared.clear()

    def share(self, handle: Handle, verdict: Verdict) -> Handle:
        """Book a tensor that is stored already."""
        self._book(verdict, "shared")
        return handle

    def borrow(self, tensor: Tensor, storage: UntypedStorage, verdict: Verdict) -> Handle:
        """Keep a tensor that stays alive anyway."""
        identity = storage._cdata
        new_bytes = 0 if identity in self._borrowed_seen else storage.nbytes()
        self._borrowed_seen.add(identity)
        self._book(verdict, "exact", new_bytes, new_bytes)
        handle = Kept(tensor)
        if identity in self.shared.noted and self.shared.is_known(identity):  # something may be derived from it
            self.shared[storage].add_kept(handle)
        else:
            self.shared.add_first(identity, handle)
        return handle

    def recast(self, handle: Recast, verdict: Verdict) -> Recast:
        """Book a cast of a weight that is made again."""
        self._book(verdict, "derived")
        return handle

    def put_first(self, tensor: Tensor, storage: UntypedStorage, verdict: Verdict) -> Handle:
        """Store a tensor of whose storage nothing is known yet."""
        nbytes, spec = storage.nbytes(), verdict.spec
        if spec is not None and self._encodes_at_once and verdict.signed is None and not verdict.waits:
            layout = Layout.of(tensor)
            nbytes_of_code = code_bytes(spec, layout, tensor, nbytes)
            if nbytes_of_code is not None and layout is not None and layout.dense:
                place = self._scope.stack[-1].next_place(verdict.operation, verdict.role)
                return self._encode_first(tensor, storage, verdict.kind, place, spec, layout, nbytes_of_code)
        if spec is not None or nbytes >= _CLONE_FACTOR * tensor.nbytes:
            return self.put(tensor, storage, verdict)
        handle = KeptFirst(tensor, verdict.versioned, self._ledger, nbytes)
        self.shared.noted[storage._cdata] = ref(handle)  # by itself: a method of its own takes 0.05 us
        place = self._scope.stack[-1].next_place(verdict.operation, verdict.role)
        self._ledger.record(place, verdict.kind, "exact", nbytes, nbytes, nbytes // tensor.element_size())
        return handle

    def keep_opaque(self, tensor: Tensor, verdict: Verdict, nbytes: int) -> Handle:
        """Keep a tensor without a storage of its own (DTensor, sparse, nested)."""
        if verdict.kind == "weight":
            self._book(verdict, "exact", nbytes, nbytes)
            return Kept(tensor)
        charge = Charge(self._ledger, saved_bytes=nbytes, raw_bytes=nbytes)
        self._book(verdict, "exact", nbytes, nbytes, nbytes // tensor.element_size())
        return Kept(tensor, charge=charge)

    def put(self, tensor: Tensor, storage: UntypedStorage, verdict: Verdict) -> Handle:
        """Store a tensor by the verdict's codec, or by reference where that costs no more."""
        layout, nbytes = Layout.of(tensor), storage.nbytes()
        site = self.site(verdict)
        spec = default = verdict.spec
        if default is not None and not default.lossless:
            if self.plan and not verdict.pinned:
                spec = self.plan.get(site, spec)
            if verdict.waits and layout is not None and spec is not None and may_wait(tensor, layout, spec):
                return self._wait_for_loss(tensor, self.shared[storage], verdict, site, spec, layout)
            if self.watch and layout is not None and code_bytes(default, layout, tensor, nbytes) is not None:
                payload = self.watch.put(tensor, layout, site, verdict, spec)
                if isinstance(payload, ProbePayload) and verdict.signed is not None and fills(tensor, layout):
                    payload.wait(None if self.keeps_width or site in self.plan else verdict.signed)
                    self._waiting.add(payload)
                if payload is not None:
                    return self.shared[storage].add(Geometry.of(tensor), layout, payload)
        if spec is None and verdict.versioned and nbytes >= _CLONE_FACTOR * tensor.nbytes:
            spec = IDENTITY
        nbytes_of_code = code_bytes(spec, layout, tensor, nbytes)
        if layout is None or spec is None or nbytes_of_code is None:
            return self._keep(tensor, storage, verdict, site)
        if verdict.signed is not None and may_fold(spec) and fills(tensor, layout):
            behind = spec if self.keeps_width or site in self.plan else verdict.signed
            return self._wait_for_relu(tensor, self.shared[storage], verdict, site, (spec, behind), layout)
        if (
            layout.dense
            and verdict.kind != "copy"
            and not (self.offload or self.split)
            and self.shared.is_first(storage)
        ):
            return self._encode_first(tensor, storage, verdict.kind, site, spec, layout, nbytes_of_code)
        return self._encode(tensor, self.shared[storage], verdict, site, spec, layout)

    def put_declared(self, tensor: Tensor, verdict: Verdict, declared: Declared) -> Kept | Deferred:
        """Store a tensor that stands in for what plain autograd would save; encode it when nothing may replace it."""
        site, layout, spec = self.site(verdict), Layout.of(tensor), verdict.spec
        if spec is not None and not spec.lossless and not verdict.pinned:
            spec = self.plan.get(site, spec)
        elements = declared.raw_bytes // tensor.element_size()
        fits = code_bytes(spec, layout, tensor, tensor.untyped_storage().nbytes()) is not None
        if layout is None or spec is None or not fits:
            held = Charge(self._ledger, saved_bytes=tensor.untyped_storage().nbytes())
            self._ledger.record(site, verdict.kind, "exact", declared.raw_bytes, held.saved_bytes, elements)
            return Kept(tensor, charge=held, others=declared.charges)
        row = self._ledger.record(site, verdict.kind, spec.label, declared.raw_bytes, 0, elements)
        stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        verdict = verdict._replace(declared=None)  # which holds the result, and so the node that holds the handle
        enter = partial(row.enter, row.step)
        encode = partial(self._encode_late, tensor, verdict, site, enter, spec, layout, stream)
        handle = Deferred(encode, declared.charges, Charge(self._ledger, waiting_bytes=tensor.nbytes))
        if declared.result is None:
            handle.settle()
        else:
            self.deferred.add(handle, declared.result)
        return handle

    def _encode_late(
        self,
        tensor: Tensor,
        verdict: Verdict,
        site: Site,
        enter: Callable[[CodecSpec, int], None],
        spec: CodecSpec,
        layout: Layout,
        stream: torch.cuda.Stream | None,
    ) -> Handle:
        """Encode a tensor that is on its site's row already, on the stream that has made it and will read it."""
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            watch = None if spec.lossless else self.watch
            given = None if watch is None else watch.put(tensor, layout, site, verdict, spec)
            entry = self.shared[tensor.untyped_storage()]
            if given is not None:
                return entry.add(Geometry.of(tensor), layout, given)
            payload, saved_bytes = self._payload(site, tensor.dtype, None)(layout.flatten(tensor), spec)
        enter(spec, saved_bytes)
        return entry.add(Geometry.of(tensor), layout, payload)

    def raw_charges(self, tensors: Iterable[Tensor]) -> tuple[tuple[Charge, ...], int]:
        """Return the charges for memory that plain autograd would keep alive, and the bytes of the new ones."""
        charges: list[Charge] = []
        raw_bytes = 0
        for tensor in tensors:
            if tensor.is_leaf and tensor.requires_grad:
                continue  # the user holds it, see `Identifier`
            storage = tensor.untyped_storage()
            charge, new_bytes = self._raw_charge(storage, self.shared[storage])
            charges.append(charge)
            raw_bytes += new_bytes
        return tuple(charges), raw_bytes

    def _keep(self, tensor: Tensor, storage: UntypedStorage, verdict: Verdict, site: Site) -> Handle:
        """Keep a tensor by reference; its storage is booked once."""
        entry = self.shared[storage]
        held, saved_bytes, raw_bytes = entry.held_charge(), 0, 0
        if held is None:
            raw, saved_bytes = entry.raw_charge(), storage.nbytes()
            raw_bytes = saved_bytes if raw is None else 0
            held = Charge(self._ledger, saved_bytes, raw_bytes, raw=raw)
        handle = Kept(tensor, verdict.versioned, held)
        entry.add_kept(handle)
        elements = raw_bytes // tensor.element_size()
        self._ledger.record(site, verdict.kind, "exact", raw_bytes, saved_bytes, elements)
        return handle

    def mask(self, mask: Tensor, site: Site) -> tuple[Handle, int]:
        """Store a mask or positions made for the occasion, which nobody else holds, and return handle and bytes."""
        layout = Layout.of(mask)
        assert layout is not None, "a fresh result is dense"
        spec = MASK if mask.dtype == torch.bool else POSITIONS
        payload, saved_bytes = self._payload(site, mask.dtype, None)(layout.flatten(mask), spec)
        return Packed(payload, tuple(mask.shape), mask.stride(), 0), saved_bytes

    def place(
        self, handle: Derived | Stand | PoolIndices, tensor: Tensor, entry: StoredStorage, verdict: Verdict, codec: str
    ) -> None:
        """Book a tensor that something else stands for; plain autograd would keep it alive all the same.

        A ReLU's derived output gets its exact sign here, which then helps to store what it is derived from.
        """
        raw, raw_bytes = self._raw_charge(tensor.untyped_storage(), entry)
        site, saved_bytes = self.site(verdict), 0
        if verdict.bit is not None:
            handle.mask, saved_bytes = self.mask(verdict.bit(tensor), site)
        handle.charge = raw
        if isinstance(handle, Derived):
            for undecided, sign in signs_behind(handle):
                undecided.settle(sign)
        self._ledger.record(site, verdict.kind, codec, raw_bytes, saved_bytes, raw_bytes // tensor.element_size())

    def _encode_first(
        self,
        tensor: Tensor,
        storage: UntypedStorage,
        kind: str,
        place: Place,
        spec: CodecSpec,
        layout: Layout,
        saved_bytes: int,
    ) -> Handle:
        """Encode the first tensor of a storage, as most are: with one object for all that is noted of it."""
        key, ledger, nbytes = self._sites.noise_key(place, self._noise), self._ledger, storage.nbytes()
        # As `Layout.flatten` does it, but without a detached alias, one operation of torch less: nothing keeps `flat`.
        flat = tensor.as_strided((layout.numel,), (1,))
        tensors = self._timed_encode(flat, spec, key)
        handle = PackedFirst(tensors, spec, tensor, layout, key, self._backend, self.cache, ledger, saved_bytes, nbytes)
        self.shared.add_packed(storage, handle)
        handle.row = ledger.record(place, kind, spec.label, nbytes, saved_bytes, nbytes // tensor.element_size())
        return handle

    def _encode(
        self, tensor: Tensor, entry: StoredStorage, verdict: Verdict, site: Site, spec: CodecSpec, layout: Layout
    ) -> Handle:
        raw, raw_bytes = None, 0
        if verdict.kind != "copy":  # made for a recipe: plain autograd would not keep it
            raw, raw_bytes = self._raw_charge(tensor.untyped_storage(), entry)
        flat, parts = layout.flatten(tensor), None
        if self.split is not None and verdict.kind == "packed" and has_rows(tensor, layout):
            parts = self.split(flat, spec, layout.size, lambda dtype: self._payload(site, dtype, raw))
        payload, saved_bytes = parts or self._payload(site, tensor.dtype, raw)(flat, spec)
        elements = raw_bytes // tensor.element_size()
        self._ledger.record(site, verdict.kind, spec.label, raw_bytes, saved_bytes, elements)
        return entry.add(Geometry.of(tensor), layout, payload)

    def _wait_for_relu(
        self,
        tensor: Tensor,
        entry: StoredStorage,
        verdict: Verdict,
        site: Site,
        specs: tuple[CodecSpec, CodecSpec],
        layout: Layout,
    ) -> Handle:
        """Keep a tensor for a while: until it is known whether a ReLU's sign helps to store it."""
        raw, raw_bytes = self._raw_charge(tensor.untyped_storage(), entry)
        encode = self._payload(site, tensor.dtype, raw)
        held = Charge(self._ledger, waiting_bytes=tensor.nbytes)
        row = self._ledger.record(site, verdict.kind, specs[0].label, raw_bytes, 0, raw_bytes // tensor.element_size())
        undecided = Undecided(tensor, layout, specs, encode, partial(row.enter, row.step), held, self.cache)
        self._waiting.add(undecided)
        return entry.add(Geometry.of(tensor), layout, undecided)

    def _wait_for_loss(
        self, tensor: Tensor, entry: StoredStorage, verdict: Verdict, site: Site, spec: CodecSpec, layout: Layout
    ) -> Handle:
        """Keep a tensor for a while: until it is known whether something divides by what follows from it.

        Who watches hears of it only then: what stays exact is not measured as if it were rounded, nor counted so.
        """
        raw, raw_bytes = self._raw_charge(tensor.untyped_storage(), entry)
        row = self._ledger.record(site, verdict.kind, spec.label, raw_bytes, 0, raw_bytes // tensor.element_size())
        unwatched, watch = self._payload(site, tensor.dtype, raw), self.watch

        def encode(flat: Tensor, spec: CodecSpec) -> tuple[AnyPayload, int]:
            given = None if watch is None else watch.put(layout.unflatten(flat), layout, site, verdict, spec)
            return unwatched(flat, spec) if given is None else (given, 0)

        enter = partial(row.enter, row.step)
        waiting = OwnDerivative(tensor, layout, spec, encode, enter, self._ledger, self.cache)
        handle = entry.add(Geometry.of(tensor), layout, waiting)
        self.own_derivatives.add(waiting, tensor.grad_fn)
        return handle

    def _payload(self, site: Site, dtype: torch.dtype, raw: Charge | None) -> Encode:
        """Return what encodes a flat segment of a site, and its bytes: now or later, with the same noise."""
        return partial(self._encode_flat, self._sites.noise_key(site, self._noise), dtype, raw)

    def _encode_flat(
        self, key: int, dtype: torch.dtype, raw: Charge | None, flat: Tensor, spec: CodecSpec
    ) -> tuple[Payload, int]:
        tensors = self._timed_encode(flat, spec, key)
        saved_bytes = spec.stored_bytes(flat.numel(), dtype)
        charges = Charge(self._ledger, saved_bytes=saved_bytes), raw
        parts = tensors, spec, flat.numel(), dtype, key, self._backend, self.cache, charges
        if self.offload is None:
            return Payload(*parts), saved_bytes
        payload = Movable(self.offload, saved_bytes, *parts)
        self.offload.add(payload)
        return payload, saved_bytes

    def _timed_encode(self, flat: Tensor, spec: CodecSpec, key: int) -> tuple[Tensor, ...]:
        start_ns = perf_counter_ns()
        tensors = encode(flat, spec, key=key, backend=self._backend)
        self._ledger.pack_ns += perf_counter_ns() - start_ns
        if not flat.is_cpu:
            self._ledger.packed_on_cpu = False
        return tensors

    def _raw_charge(self, storage: UntypedStorage, entry: StoredStorage) -> tuple[Charge, int]:
        charge = entry.raw_charge()
        if charge is None:
            charge, raw_bytes = Charge(self._ledger, raw_bytes=storage.nbytes()), storage.nbytes()
        else:
            charge, raw_bytes = charge.raw_alone(), 0
        entry.set_raw_charge(charge)
        return charge, raw_bytes

    def site(self, verdict: Verdict) -> Site:
        """Return the site of the tensor that is being saved; one call for each tensor."""
        return self._sites[self._scope.stack[-1].next_place(verdict.operation, verdict.role)]

    def _book(self, verdict: Verdict, codec: str, raw_bytes: int = 0, saved_bytes: int = 0, elements: int = 0) -> None:
        place = self._scope.stack[-1].next_place(verdict.operation, verdict.role)
        self._ledger.record(place, verdict.kind, codec, raw_bytes, saved_bytes, elements)
