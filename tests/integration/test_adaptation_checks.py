"""A plan is checked after it is set, and a sum over the sites that does not hold is said."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_actmem import ActMem, ActMemWarning
from lightning_actmem.adapt.adapter import Adapter
from lightning_actmem.integration.adaptation import CHECK_PASSES, MAX_CHECKS
from tests.integration.adapting import NOISE, run
from tests.integration.support import (
    PACK_ALL,
)

pytestmark = pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")  # sub-batches of 4 samples scatter


def exaggerate(monkeypatch: pytest.MonkeyPatch, factor: float, count: int) -> None:
    """Have a run's checks find more noise than there is, so many times."""
    take = Adapter._take
    left = [count]

    def wrong(self: Adapter, measurement: Any) -> None:
        take(self, measurement)
        is_check = measurement.passes <= CHECK_PASSES
        if is_check and left[0]:
            left[0] -= 1
            self.measured_noise = factor * NOISE

    monkeypatch.setattr(Adapter, "_take", wrong)


def test_bits_go_up_at_once_where_a_plan_makes_more_noise_than_it_was_held_to(monkeypatch):
    exaggerate(monkeypatch, 1.5, count=1)
    _, actmem = run(batches=20, epochs=1)
    first, second, third = actmem.adaptation.history
    assert [record.step for record in (first, second, third)] == [10, 11, 12]
    assert [record.is_check for record in (first, second, third)] == [False, True, True]
    assert second.noise == 1.5 * NOISE
    assert second.planned_noise < first.planned_noise
    assert sum(second.bits.values()) > sum(first.bits.values())
    assert third.noise < NOISE
    assert third.bits == second.bits


def test_a_check_lets_pass_what_may_be_chance(monkeypatch):
    exaggerate(monkeypatch, 1.1, count=1)
    _, actmem = run(batches=20, epochs=1)
    first, second = actmem.adaptation.history
    assert second.is_check
    assert second.changes == ()
    assert second.bits == first.bits


def test_checks_come_to_an_end(monkeypatch):
    exaggerate(monkeypatch, 1.5, count=100)
    allocate = Adapter.allocate

    def restless(self: Adapter) -> list[Any]:
        return allocate(self) or ["something"]

    monkeypatch.setattr(Adapter, "allocate", restless)
    _, actmem = run(batches=20, epochs=1)
    assert [record.is_check for record in actmem.adaptation.history] == [False, *[True] * MAX_CHECKS]


def test_a_plan_is_checked_again_later_and_then_nothing_is_left_to_chance(monkeypatch):
    """Noise grows in the course of a training: what was chance in the first check is not in a later one."""
    exaggerate(monkeypatch, 1.1, count=2)
    _, actmem = run(batches=30, epochs=1)
    first, check, later, last = actmem.adaptation.history
    assert [record.step for record in (first, check, later, last)] == [10, 11, 26, 27]
    assert all(record.is_check for record in (check, later, last))
    assert check.changes == ()
    assert later.planned_noise < first.planned_noise
    assert sum(later.bits.values()) > sum(first.bits.values()) == sum(check.bits.values())
    assert last.bits == later.bits


@pytest.mark.filterwarnings("ignore:ActMem. budget='1000' asks for at most")
def test_a_budget_needs_no_check():
    _, actmem = run(batches=20, epochs=1, actmem=ActMem(budget="1000", **PACK_ALL))
    (record,) = actmem.adaptation.history
    assert record.changes


@pytest.mark.filterwarnings("default:ActMem. the gradient noise is")
def test_the_guard_warns_where_the_sum_over_the_sites_does_not_hold(monkeypatch):
    take = Adapter._take

    def wrong(self: Adapter, measurement: Any) -> None:
        take(self, measurement)
        self.measured_noise = 2 * self.expected_noise

    monkeypatch.setattr(Adapter, "_take", wrong)
    with pytest.warns(ActMemWarning, match="more than a factor of 1.5 apart"):
        run(epochs=2)


@pytest.mark.filterwarnings("error:ActMem. the gradient noise is")
def test_the_guard_is_silent_within_its_factor(monkeypatch):
    take = Adapter._take

    def close(self: Adapter, measurement: Any) -> None:
        take(self, measurement)
        self.measured_noise = 1.4 * self.expected_noise

    monkeypatch.setattr(Adapter, "_take", close)
    run(epochs=2)


@pytest.mark.filterwarnings("error:ActMem. the gradient noise is")
def test_the_guard_waits_until_every_site_has_been_measured(monkeypatch):
    take = Adapter._take

    def partly(self: Adapter, measurement: Any) -> None:
        take(self, measurement)
        self.sensitivities.averages.popitem()
        self.measured_noise = 2 * self.expected_noise

    monkeypatch.setattr(Adapter, "_take", partly)
    run(epochs=2)
