"""The first tensor by reference of a storage: it books the bytes itself, and hands them over when they are shared."""

from __future__ import annotations

import gc

import pytest
import torch

from lightning_actmem.saved.kept_first import KeptFirst
from lightning_actmem.saved.ledger import Ledger


def bytes_now(ledger: Ledger) -> tuple[int, int, int]:
    ledger.settle()
    return ledger.live_saved_bytes, ledger.live_raw_bytes, ledger.peak_saved_bytes


def test_its_bytes_live_as_long_as_it_does() -> None:
    ledger, x = Ledger(), torch.randn(8)
    kept = KeptFirst(x, True, ledger, x.nbytes)
    assert bytes_now(ledger) == (32, 32, 32)
    other = KeptFirst(x, True, ledger, 10)
    del kept
    assert bytes_now(ledger) == (10, 10, 42)
    assert other.restore() is x


def test_a_shared_charge_is_booked_once_and_outlives_it() -> None:
    ledger, x = Ledger(), torch.randn(8)
    kept = KeptFirst(x, True, ledger, x.nbytes)
    charge = kept.charge
    assert kept.charge is charge
    assert bytes_now(ledger) == (32, 32, 32)
    del kept
    assert bytes_now(ledger) == (32, 32, 32)
    del charge
    assert bytes_now(ledger) == (0, 0, 32)


def test_it_holds_no_node_and_sees_changes_in_place() -> None:
    x = torch.randn(8, requires_grad=True)
    y = x.exp()
    kept = KeptFirst(y, True, Ledger(), y.nbytes)
    assert not kept.restore().requires_grad
    y.detach_().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.restore()


def test_the_garbage_collector_may_free_it() -> None:
    ledger, x = Ledger(), torch.randn(8)
    circle: list[object] = [KeptFirst(x, True, ledger, x.nbytes)]
    circle.append(circle)
    del circle
    gc.collect()
    assert bytes_now(ledger)[0] == 0
