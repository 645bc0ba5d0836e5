"""Whereabouts: what is on the device and on the host, now and at most."""

from __future__ import annotations

import pytest

from lightning_actmem.saved.ledger import Charge, Ledger
from lightning_actmem.saved.whereabouts import Booking, Whereabouts


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(whereabouts=Whereabouts())


def live(ledger: Ledger) -> tuple[int, int]:
    ledger.settle()
    assert ledger.whereabouts is not None
    return ledger.whereabouts.device_bytes(ledger.live_saved_bytes), ledger.whereabouts.live_host_bytes


def peaks(ledger: Ledger) -> tuple[int, int]:
    assert ledger.whereabouts is not None
    return ledger.whereabouts.peak_device_bytes(ledger.live_saved_bytes), ledger.whereabouts.peak_host_bytes


def test_what_moves_is_in_both_places_for_a_while(ledger: Ledger) -> None:
    charge = Charge(ledger, saved_bytes=100)
    assert live(ledger) == (100, 0)
    buffer, host = Booking(ledger, buffer_bytes=128), Booking(ledger, host_bytes=128)
    moved = Booking(ledger, moved_bytes=100)
    assert live(ledger) == (128, 128)
    del buffer
    assert live(ledger) == (0, 128)
    assert peaks(ledger) == (228, 128)
    fetched = Booking(ledger, buffer_bytes=128)
    assert live(ledger) == (128, 128)
    del charge, moved, host, fetched
    assert live(ledger) == (0, 0)
    assert peaks(ledger) == (228, 128)


def test_a_step_starts_from_what_is_there(ledger: Ledger) -> None:
    charges = [Charge(ledger, saved_bytes=100), Charge(ledger, saved_bytes=50)]
    moved, host = Booking(ledger, moved_bytes=100), Booking(ledger, host_bytes=128)
    assert peaks(ledger) == (150, 128)
    ledger.start_step()
    assert peaks(ledger) == (50, 128)
    del host, moved
    charges.clear()
    assert peaks(ledger) == (50, 128)
    ledger.start_step()
    assert peaks(ledger) == (0, 0)


def test_the_peak_before_a_move_is_not_forgotten(ledger: Ledger) -> None:
    """What is stored only grows between two looks at the ledger; what is on the device does not."""
    ledger.start_step()
    charges = [Charge(ledger, saved_bytes=100) for _ in range(3)]
    moved = Booking(ledger, moved_bytes=300)
    charges.append(Charge(ledger, saved_bytes=10))
    assert peaks(ledger) == (300, 0)
    assert live(ledger) == (10, 0)
    assert (len(charges), ledger.peak_saved_bytes) == (4, 310)
    del moved
