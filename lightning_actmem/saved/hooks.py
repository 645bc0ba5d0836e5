"""The pair of hooks: autograd's saved tensor in, a handle out; and back."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller

import torch
from torch import Tensor, UntypedStorage, nn

from .borrowed import Borrowed
from .deferred import Deferred
from .derive import FROM_SAVED, SAVES_OUTPUT, Deriver
from .geometry import REAL, Geometry
from .handle import Handle, PoolIndices, Stand
from .identify import Identifier, Verdict
from .ledger import BORROWED
from .operation import COPYING
from .own_derivative import may_divide
from .payload import EXACT_BITS
from .scope import LayerScope
from .share import StoredStorage
from .store import IDENTITY, Store
from .tracker import Call, OperationTracker
from .weights import Recast, is_weight, recast

_TENSOR_TYPES = (Tensor, nn.Parameter)
_STRIDED = torch.strided
# Whose recipes need what they have saved beside their arguments: masks, statistics, copies.
_READ_AFTERWARDS = FROM_SAVED | COPYING
_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}


class SavedTensorHooks:
    """Packs and unpacks for one engine.

    Args:
        tracker: Tells the running operation.
        scope: Tells the running module call.
        store: Stores tensors.
        identifier: Decides how.
        derive: Whether to derive tensors from others instead of storing them.
    """

    def __init__(
        self,
        tracker: OperationTracker,
        scope: LayerScope,
        store: Store,
        identifier: Identifier,
        derive: bool,
    ) -> None:
        self._tracker = tracker
        self._scope = scope
        self._store = store
        self._identifier = identifier
        self._deriver = Deriver(store.shared, store.cache, self._copy, identifier.min_elements) if derive else None
        tracker.observer = self._deriver

    def start_step(self, borrowed: Borrowed, noise: int) -> None:
        """Begin a step.

        Args:
            borrowed: The storages of the model and the batch.
            noise: 64-bit mix of seed, rank and step.
        """
        self._identifier.borrowed = borrowed
        self._store.start_step(noise)
        if self._deriver is not None:
            self._deriver.start_step(borrowed)

    def end_step(self) -> None:
        """Let go of everything that belongs to the step; handles live on with autograd's graph."""
        self._identifier.borrowed = Borrowed()
        self._store.end_step()
        if self._deriver is not None:
            self._deriver.start_step(self._identifier.borrowed)

    #: Return the tensor that a handle stands for.
    unpack: Callable[[Handle | Deferred | Recast], Tensor] = staticmethod(methodcaller("restore"))

    def pack(self, tensor: Tensor) -> Handle | Deferred | Recast:
        """Store a tensor that autograd saves and return its handle."""
        store = self._store
        if store.deferred.waiting:
            store.deferred.settle()
        # Not in a function of its own: each takes 0.05 us.
        if (
            type(tensor) not in _TENSOR_TYPES
            or tensor.layout is not _STRIDED
            or tensor.is_nested
            or tensor.is_neg()
            or (tensor.dtype not in REAL and (tensor.is_quantized or tensor.is_conj()))
        ):
            return self._keep_opaque(tensor)  # a conjugate view has the storage of its base, and other values
        storage = tensor.untyped_storage()
        identity: int = storage._cdata
        call = self._tracker.call
        verdict = self._identifier.identify(tensor, identity, call, self._scope.stack[-1])
        if store.own_derivatives.waiting and may_divide(verdict.operation, verdict.kind):
            store.own_derivatives.keep_behind(tensor.grad_fn)
        if verdict.is_final and identity not in store.shared.noted:
            handle: Handle | Recast = store.put_first(tensor, storage, verdict)
        elif verdict.declared is not None:
            return store.put_declared(tensor, verdict, verdict.declared)
        else:
            handle = self._pack(tensor, storage, verdict)
        if verdict.operation in _READ_AFTERWARDS and verdict.role == "result":
            self._note_saved(call, tensor, handle)
        return handle

    def _note_saved(self, call: Call, tensor: Tensor, handle: Handle | Recast) -> None:
        """Note what an operation has computed for its backward, for the recipe of its result."""
        if self._deriver is None or isinstance(handle, Recast):
            return
        if call.saved is not None:
            call.saved.append((tensor, handle))
        if call.operation.name in COPYING:
            self._deriver.note_copy(call, tensor, handle)

    def _pack(self, tensor: Tensor, storage: UntypedStorage, verdict: Verdict) -> Handle | Recast:
        if verdict.kind in BORROWED:
            again = recast(tensor) if verdict.kind == "weight" and self._deriver is not None else None
            # Of a weight that changes within the step it may be a cast of what was there before.
            if again is not None and not self._identifier.borrowed.has_changed(again.parameter):
                return self._store.recast(again, verdict)
            return self._store.borrow(tensor, storage, verdict)
        derivable = verdict.derivable and self._deriver is not None
        stands_in = verdict.levels is not None or verdict.window is not None
        if not (derivable or stands_in or self._store.shared.is_known(storage._cdata)):
            return self._store.put_first(tensor, storage, verdict)
        entry = self._store.shared[storage]
        if verdict.levels is not None:
            stand = Stand(tensor, *verdict.levels)
            self._store.place(stand, tensor, entry, verdict, "nothing" if verdict.bit is None else "mask-1")
            return stand
        if verdict.window is not None:
            indices = PoolIndices(tensor, verdict.window)
            self._store.place(indices, tensor, entry, verdict, "window-4")
            return indices
        if verdict.versioned:
            handle = None if entry.is_empty else entry.find(Geometry.of(tensor), verdict.least_bits)
            if handle is not None:
                return self._store.share(handle, verdict)
            handle = self._derive(tensor, entry, verdict) if derivable else None
            if handle is not None:
                return handle
        return self._store.put(tensor, storage, verdict)

    def _derive(self, tensor: Tensor, entry: StoredStorage, verdict: Verdict) -> Handle | None:
        if self._deriver is None:
            return None
        call = self._tracker.call
        if call.saved is not None and verdict.operation in SAVES_OUTPUT and verdict.is_output:
            self._deriver.after(call, tensor)
        if verdict.role == "result" and verdict.operation in COPYING:
            self._deriver.note_original(call, tensor, entry)
        attention = verdict.kind == "attention"
        derived = self._deriver.derive(entry, tensor._version, verdict.least_bits, attention)
        handle = None if derived is None else entry.find(Geometry.of(tensor), verdict.least_bits)
        if derived is not None and handle is not None:
            self._store.place(derived, tensor, entry, verdict, "derived")
            if derived.mask is not None:  # all that a ReLU reads of its output
                return Stand(tensor, 0.0, 1.0, derived.mask, derived)
        return handle

    def _copy(self, tensor: Tensor) -> Handle:
        storage = tensor.untyped_storage()
        handle = self._store.shared[storage].find(Geometry.of(tensor), EXACT_BITS, by_value=True)
        return handle or self._store.put(tensor, storage, Verdict(self._tracker.name(), "source", "copy", IDENTITY))

    def _keep_opaque(self, tensor: Tensor) -> Handle:
        operation = self._tracker.name() or "custom"
        kind = "weight" if is_weight(tensor) else "unsupported"
        return self._store.keep_opaque(tensor, Verdict(operation, "result", kind), _opaque_bytes(tensor))


def _opaque_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor without a storage of its own: those of its elements."""
    parts = _SPARSE_PARTS.get(tensor.layout)
    if parts is not None:
        return sum(getattr(tensor, part)().nbytes for part in parts)
    return tensor.numel() * tensor.element_size()
