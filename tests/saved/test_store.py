"""The store: every byte is booked once, and only as long as somebody holds it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from lightning_actmem.saved.declared import Declared
from lightning_actmem.saved.handle import Kept, Packed
from lightning_actmem.saved.identify import Verdict
from lightning_actmem.saved.ledger import Ledger
from lightning_actmem.saved.offload import Offload
from lightning_actmem.saved.parcel import Movable
from lightning_actmem.saved.payload import Payload
from lightning_actmem.saved.scope import Frame, LayerScope
from lightning_actmem.saved.site import Site
from lightning_actmem.saved.store import Store
from lightning_actmem_kernels import CodecSpec
from tests.saved.slow_transport import SlowTransport

SMALL = Verdict("tanh", "result", "small")
PACKED = Verdict("linear", "input", "packed", CodecSpec("uniform", bits=4))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def store(ledger: Ledger) -> Store:
    return Store(LayerScope(nullcontext), ledger, None)


def live_bytes(ledger: Ledger) -> tuple[int, int]:
    ledger.settle()
    return ledger.live_saved_bytes, ledger.live_raw_bytes


def test_the_first_of_a_storage_is_kept_and_booked_once(store: Store, ledger: Ledger) -> None:
    x = torch.randn(1024)
    storage = x.untyped_storage()
    first = store.put_first(x, storage, SMALL)
    second = store.put(x[1:], storage, SMALL)
    assert isinstance(first, Kept)
    assert live_bytes(ledger) == (x.nbytes, x.nbytes)
    del first
    assert live_bytes(ledger) == (x.nbytes, x.nbytes)
    del second
    assert live_bytes(ledger) == (0, 0)
    assert [(row.tensors, row.raw_bytes) for row in ledger.sites.values()] == [(1, x.nbytes), (1, 0)]


@pytest.mark.parametrize("kept_first", [True, False])
def test_a_code_holds_the_raw_bytes_when_what_was_kept_is_gone(store: Store, ledger: Ledger, kept_first: bool) -> None:
    x = torch.randn(1024)
    storage = x.untyped_storage()
    handles = {}
    for verdict in (SMALL, PACKED) if kept_first else (PACKED, SMALL):
        known = store.shared.is_known(storage._cdata)
        put = store.put(x, storage, verdict) if known else store.put_first(x, storage, verdict)
        handles[verdict.kind] = put
    code_bytes = CodecSpec("uniform", bits=4).stored_bytes(1024, x.dtype)
    assert live_bytes(ledger) == (x.nbytes + code_bytes, x.nbytes)
    del put, handles["small"]
    assert live_bytes(ledger) == (code_bytes, x.nbytes)
    handles.clear()
    assert live_bytes(ledger) == (0, 0)


def test_a_small_view_of_a_large_storage_is_copied(store: Store, ledger: Ledger) -> None:
    x = torch.randn(1024)
    handle = store.put_first(x[:8], x.untyped_storage(), SMALL)
    assert torch.equal(handle.restore(), x[:8])
    assert live_bytes(ledger) == (8 * x.element_size(), x.nbytes)


def test_what_is_encoded_after_its_step_is_no_part_of_the_next(store: Store, ledger: Ledger) -> None:
    """Rows are used again: bytes of a backward pass after the next forward pass would be on the next step's row."""
    declared = Declared("derivative", result=torch.ones(()), raw_bytes=4096)
    verdict = Verdict("gelu", "derivative", "packed", CodecSpec("uniform", bits=4), declared=declared)
    handle = store.put_declared(torch.randn(1024), verdict, declared)
    store.start_step(0)
    store._scope.stack[:] = [Frame("")]  # the next step: ordinals begin again
    exact = store.put_first(torch.randn(4), torch.randn(4).untyped_storage(), Verdict("gelu", "derivative", "small"))
    handle.restore()
    assert [(row.codec, row.saved_bytes) for row in ledger.sites.values()] == [("exact", 16)]
    assert isinstance(exact, Kept)


def test_segments_are_movable_only_where_something_moves(store: Store, ledger: Ledger) -> None:
    kinds = []
    for offload in (None, Offload(ledger, 0, SlowTransport())):
        store.offload = offload
        handle, _ = store.mask(torch.ones(1024, dtype=torch.bool), Site("", "relu", "result", 0))
        assert isinstance(handle, Packed)
        kinds.append(type(handle.payload))
    assert kinds == [Payload, Movable]
