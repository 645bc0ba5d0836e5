"""The payload that is its own handle: booked, shared and let go like any other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_actmem.saved.geometry import Geometry
from lightning_actmem.saved.handle import Packed
from lightning_actmem.saved.identify import Verdict
from lightning_actmem.saved.ledger import Ledger
from lightning_actmem.saved.packed_first import PackedFirst
from lightning_actmem.saved.scope import Frame, LayerScope
from lightning_actmem.saved.store import Store
from lightning_actmem_kernels import CodecSpec

COPY = Verdict("tanh", "result", "packed", CodecSpec("identity"))
CODE = Verdict("linear", "input", "packed", CodecSpec("uniform", bits=4))
CODE_BYTES = CodecSpec("uniform", bits=4).stored_bytes(1024, torch.float32)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture(params=["entry", "no entry"])
def store(ledger: Ledger, request: pytest.FixtureRequest) -> Store:
    """A store in a step; with an entry for every storage it takes the longer way to the same handle."""
    store = Store(LayerScope(nullcontext), ledger, None)
    store.start_step(7)
    if request.param == "entry":
        put_first = store.put_first

        def put_where_known(tensor: Tensor, storage: torch.UntypedStorage, verdict: Verdict) -> Any:
            store.shared[storage]
            return store.put(tensor, storage, verdict) if verdict.spec else put_first(tensor, storage, verdict)

        store.put_first = put_where_known  # type: ignore[method-assign]
    return store


def live_bytes(ledger: Ledger) -> tuple[int, int]:
    ledger.settle()
    return ledger.live_saved_bytes, ledger.live_raw_bytes


def test_what_is_packed_once_is_one_object(store: Store, ledger: Ledger) -> None:
    x = torch.randn(16, 64).t()
    handle = store.put_first(x, x.untyped_storage(), COPY)
    assert isinstance(handle, PackedFirst)
    restored = handle.restore()
    assert torch.equal(restored, x)
    assert restored.stride() == x.stride()
    assert restored.data_ptr() != x.data_ptr()
    assert live_bytes(ledger) == (x.nbytes, x.nbytes)
    del handle
    assert live_bytes(ledger) == (0, 0)


def test_views_share_it_and_its_bytes_live_as_long_as_they_do(store: Store, ledger: Ledger) -> None:
    x = torch.randn(1024)
    storage = x.untyped_storage()
    first = store.put_first(x, storage, CODE)
    view = store.shared[storage].find(Geometry.of(x.view(32, 32)[1:]), 4)
    assert isinstance(view, Packed)
    assert view.payload is first
    assert torch.equal(view.restore(), first.restore().view(32, 32)[1:])
    assert store.shared[storage].find(Geometry.of(x), 8) is None
    restored = first.restore()
    del first
    assert live_bytes(ledger) == (CODE_BYTES, x.nbytes)
    assert torch.equal(view.restore(), restored.view(32, 32)[1:])
    del view
    assert live_bytes(ledger) == (0, 0)


def test_raw_bytes_pass_to_whoever_stores_more_of_the_storage(store: Store, ledger: Ledger) -> None:
    x = torch.randn(1024)
    storage = x.untyped_storage()
    first = store.put_first(x, storage, CODE)
    exact = store.put(x, storage, Verdict("tanh", "result", "small"))
    assert live_bytes(ledger) == (CODE_BYTES + x.nbytes, x.nbytes)
    del first
    assert live_bytes(ledger) == (x.nbytes, x.nbytes)
    again = store.put(x, storage, CODE)  # the storage is booked already
    assert live_bytes(ledger) == (CODE_BYTES + x.nbytes, x.nbytes)
    del exact
    assert live_bytes(ledger) == (CODE_BYTES, x.nbytes)
    del again
    assert live_bytes(ledger) == (0, 0)


def test_what_was_changed_since_is_stored_anew(store: Store) -> None:
    x = torch.zeros(1024)
    storage = x.untyped_storage()
    first = store.put_first(x, storage, COPY)
    x += 1
    assert store.shared[storage].find(Geometry.of(x), 1) is None
    second = store.put(x, storage, COPY)
    assert first.restore().sum() == 0
    assert second.restore().sum() == 1024


def test_an_address_that_is_used_again_is_not_taken_for_the_first(store: Store) -> None:
    """Storages that come and go get the same address; a handle does not keep its storage alive."""
    handles = []
    for value in range(50):
        x = torch.full((1024,), float(value))
        assert not store.shared.is_known(x.untyped_storage()._cdata)
        handles.append(store.put_first(x, x.untyped_storage(), COPY))
        del x
    assert [handle.restore()[0].item() for handle in handles] == list(range(50))


def test_the_noise_is_that_of_the_site_on_either_way(ledger: Ledger) -> None:
    x = torch.randn(1024)
    restored = []
    for is_known in (False, True):
        store = Store(LayerScope(nullcontext), ledger, None)
        store.start_step(7)
        store._scope.stack[:] = [Frame("")]
        if is_known:
            store.shared[x.untyped_storage()]
        put = store.put if is_known else store.put_first
        restored.append(put(x, x.untyped_storage(), CODE).restore())
    assert torch.equal(*restored)


def test_a_plan_has_its_say(ledger: Ledger) -> None:
    x = torch.randn(1024)
    store = Store(LayerScope(nullcontext), ledger, None)
    store.plan = {store.site(CODE): CodecSpec("uniform", bits=8)}
    store._scope.stack[:] = [Frame("")]
    store.start_step(7)
    handle = store.put_first(x, x.untyped_storage(), CODE)
    assert isinstance(handle, PackedFirst)
    assert handle.spec.bits == 8


SIGMOID = Verdict("sigmoid", "result", "packed", CodecSpec("uniform", bits=4))
LOSS = Verdict("binary_cross_entropy", "input", "loss")


def test_a_sigmoid_reads_its_result_where_somebody_keeps_it(store: Store, ledger: Ledger) -> None:
    y = torch.rand(32, 32).t()
    storage = y.untyped_storage()
    first = store.put_first(y, storage, SIGMOID)
    kept = store.put(y[4:], storage, LOSS)
    assert torch.equal(first.restore(), y)
    assert first.restore().stride() == y.stride()
    assert first.bits == 32
    assert live_bytes(ledger) == (y.nbytes, y.nbytes)
    assert sum(row.saved_bytes for row in ledger.rows) == y.nbytes
    del kept
    assert torch.equal(first.restore(), y)
    assert live_bytes(ledger) == (y.nbytes, y.nbytes)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.restore()
    del first
    assert live_bytes(ledger) == (0, 0)


@pytest.mark.parametrize(
    ("code", "change"),
    [(CODE, lambda y: y), (SIGMOID, lambda y: y.mul_(2)), (SIGMOID, lambda y: y.view(torch.int32))],
    ids=["an input", "changed", "another type"],
)
def test_the_code_stays_where_what_is_kept_is_something_else(
    store: Store, code: Verdict, change: Callable[[Tensor], Tensor]
) -> None:
    y = torch.rand(1024)
    first = store.put_first(y, y.untyped_storage(), code)
    restored = first.restore()
    kept = store.put(change(y), y.untyped_storage(), LOSS)
    assert torch.equal(first.restore(), restored)
    assert first.bits == 4
    del kept
