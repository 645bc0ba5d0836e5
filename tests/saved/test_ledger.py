"""The ledger: live and peak bytes follow the objects that hold them."""

from __future__ import annotations

import threading

from lightning_actmem.saved.ledger import Charge, Ledger
from lightning_actmem.saved.site import Site


def test_bytes_live_as_long_as_their_charge() -> None:
    ledger = Ledger()
    first = Charge(ledger, saved_bytes=10, raw_bytes=80)
    second = Charge(ledger, saved_bytes=5)
    assert (ledger.live_saved_bytes, ledger.live_raw_bytes) == (15, 80)
    del first
    ledger.settle()
    assert (ledger.live_saved_bytes, ledger.live_raw_bytes) == (5, 0)
    assert (ledger.peak_saved_bytes, ledger.peak_raw_bytes) == (15, 80)
    assert second.saved_bytes == 5


def test_a_step_starts_from_what_is_alive() -> None:
    ledger = Ledger()
    dead = Charge(ledger, saved_bytes=7)
    del dead
    alive = Charge(ledger, saved_bytes=3)
    ledger.record(Site("a", "gelu", "input", 0), "packed", "uniform-4", 8, 3, 2)
    ledger.start_step()
    assert (ledger.peak_saved_bytes, ledger.sites) == (alive.saved_bytes, {})


def test_raw_bytes_can_outlive_what_is_stored() -> None:
    ledger = Ledger()
    held = Charge(ledger, saved_bytes=10, raw_bytes=80)
    raw = held.raw_alone()
    assert held.raw_alone() is raw
    assert raw.raw_alone() is raw
    assert (ledger.live_saved_bytes, ledger.live_raw_bytes) == (10, 80)
    del held
    ledger.settle()
    assert (ledger.live_saved_bytes, ledger.live_raw_bytes) == (0, 80)
    del raw
    ledger.settle()
    assert ledger.live_raw_bytes == 0


def test_what_is_stored_keeps_its_raw_bytes() -> None:
    ledger = Ledger()
    held = Charge(ledger, saved_bytes=10, raw_bytes=80)
    held.raw_alone()
    ledger.settle()
    assert (ledger.live_saved_bytes, ledger.live_raw_bytes) == (held.saved_bytes, 80)


def test_rows_add_up() -> None:
    ledger = Ledger()
    site = Site("a", "gelu", "input", 0)
    for _ in range(3):
        ledger.record(site, "packed", "uniform-4", raw_bytes=32, saved_bytes=4, elements=8)
    row = ledger.sites[site]
    assert (row.tensors, row.raw_bytes, row.saved_bytes, row.elements) == (3, 96, 12, 24)


def test_a_new_step_has_rows_of_its_own() -> None:
    ledger = Ledger()
    one, two = Site("a", "gelu", "input", 0), Site("b", "gelu", "input", 0)
    for site in (one, two):
        ledger.record(site, "packed", "uniform-4", 32, 4, 8)
    before = ledger.sites
    ledger.start_step()
    for site in (two, one, one):
        ledger.record(tuple(site), "small", "exact", 8, 8, 2)  # by its fields: the same site
    assert [(site, row.tensors, row.saved_bytes, row.codec) for site, row in ledger.sites.items()] == [
        (two, 1, 8, "exact"),
        (one, 2, 16, "exact"),
    ]
    assert [(site, row.saved_bytes, row.codec) for site, row in before.items()] == [
        (one, 4, "uniform-4"),
        (two, 4, "uniform-4"),
    ]


def test_charges_released_by_other_threads_are_all_counted() -> None:
    """Autograd drops handles from its device threads; `x -= n` there loses updates."""
    ledger = Ledger()
    charges = [[Charge(ledger, saved_bytes=1) for _ in range(2000)] for _ in range(4)]
    threads = [threading.Thread(target=part.clear) for part in charges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.settle()
    assert ledger.live_saved_bytes == 0
