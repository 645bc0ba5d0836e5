"""The report: figures, names and rows."""

from __future__ import annotations

from lightning_actmem.report import step_report
from lightning_actmem.saved.ledger import Charge, Ledger
from lightning_actmem.saved.site import Site
from lightning_actmem.saved.whereabouts import Booking, Whereabouts


def ledger() -> tuple[Ledger, list[Charge]]:
    book = Ledger()
    charges = [Charge(book, saved_bytes=100, raw_bytes=800), Charge(book, saved_bytes=50, raw_bytes=50)]
    book.record(Site("fc", "gelu", "input", 0), "packed", "uniform-4", 600, 75, 150)
    book.record(Site("fc", "linear", "input", 0), "packed", "uniform-4", 200, 25, 50)
    book.record(Site("fc", "linear", "input", 1), "packed", "shared", 0, 0, 0)
    book.record(Site("fc", "linear", "weight", 0), "weight", "exact", 400, 400, 0)
    book.record(Site("", "cross_entropy", "result", 0), "loss", "exact", 50, 50, 25)
    book.pack_ns = 1_500_000
    return book, charges


def test_figures() -> None:
    book, charges = ledger()
    report = step_report(book)
    assert len(charges) == 2
    assert report.metrics() == {
        "actmem/saved_bytes": 150.0,
        "actmem/raw_bytes": 850.0,
        "actmem/ratio": 850 / 150,
        "actmem/bits_per_element": 8 * 150 / 225,
        "actmem/pack_ms": 1.5,
    }
    assert report.bytes_by_kind == {"packed": (800, 100), "weight": (400, 400), "loss": (50, 50)}


def test_rows_group_a_layers_tensors_by_how_they_are_stored() -> None:
    book, _charges = ledger()
    rows = [
        (row.layer, row.operations, row.kind, row.codec, row.tensors, row.saved_bytes) for row in step_report(book).rows
    ]
    assert rows == [
        ("fc", ("gelu", "linear"), "packed", "uniform-4", 2, 100),
        ("fc", ("linear",), "packed", "shared", 1, 0),
        ("fc", ("linear",), "weight", "exact", 1, 400),
        ("", ("cross_entropy",), "loss", "exact", 1, 50),
    ]


def test_pack_time_is_left_out_where_it_would_need_a_synchronisation() -> None:
    book, _charges = ledger()
    book.packed_on_cpu = False
    assert step_report(book).pack_ms is None
    assert "actmem/pack_ms" not in step_report(book).metrics()


def test_a_report_does_not_move_with_the_ledger() -> None:
    book, _charges = ledger()
    report = step_report(book)
    book.start_step()
    assert report.stored_bytes == 150


def test_places_are_figures_only_where_something_moves() -> None:
    book, _charges = ledger()
    assert (step_report(book).device_bytes, step_report(book).offloaded_bytes) == (None, None)
    book.whereabouts = Whereabouts()
    on_device, moved = Booking(book, buffer_bytes=40), Booking(book, moved_bytes=30)
    on_host = Booking(book, host_bytes=40)
    del on_device
    report = step_report(book)
    assert (report.device_bytes, report.offloaded_bytes) == (190, 40)  # for a while they were in both
    assert report.metrics()["actmem/device_bytes"] == 190.0
    assert report.metrics()["actmem/offloaded_bytes"] == 40.0
    assert report.saved_bytes == 150
    assert moved is not on_host
