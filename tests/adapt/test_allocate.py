"""Allocation against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem.adapt.allocate import Choice, _hull, fewest_bytes, least_variance

SITES = st.lists(
    st.lists(
        st.builds(Choice, st.none(), st.integers(1, 60), st.floats(0, 1, width=16, allow_subnormal=False)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=4,
)


def totals(chosen: Sequence[Choice]) -> tuple[int, float]:
    return sum(choice.stored_bytes for choice in chosen), sum(choice.variance for choice in chosen)


def jump(sites: Sequence[Sequence[Choice]]) -> float:
    """The most that one step on a hull takes away: how far the greedy choice may stay behind the optimum."""
    hulls = map(_hull, sites)
    return max((a.variance - b.variance for hull in hulls for a, b in itertools.pairwise(hull)), default=0.0)


@given(SITES, st.integers(1, 250))
def test_least_variance_is_within_a_step_of_the_optimum(sites: list[list[Choice]], max_bytes: int) -> None:
    stored_bytes, variance = totals(least_variance(sites, max_bytes))
    plans = [totals(plan) for plan in itertools.product(*sites)]
    within = [found for found in plans if found[0] <= max_bytes]
    if not within:
        assert stored_bytes == min(plans)[0]
        return
    assert stored_bytes <= max_bytes
    assert variance <= min(found[1] for found in within) + jump(sites) + 1e-9


@given(SITES)
def test_least_variance_is_optimal_where_the_budget_ends_on_a_corner(sites: list[list[Choice]]) -> None:
    steps = sorted(
        ((a.variance - b.variance) / (b.stored_bytes - a.stored_bytes), b.stored_bytes - a.stored_bytes)
        for hull in map(_hull, sites)
        for a, b in itertools.pairwise(hull)
    )
    budget = sum(min(choice.stored_bytes for choice in choices) for choices in sites)
    plans = [totals(plan) for plan in itertools.product(*sites)]
    for _, extra in [(0.0, 0), *reversed(steps)]:
        budget += extra
        best = min(variance for stored_bytes, variance in plans if stored_bytes <= budget)
        assert totals(least_variance(sites, budget))[1] == pytest.approx(best, abs=1e-9)


@given(SITES, st.floats(0, 3))
def test_fewest_bytes_keep_the_variance_and_save_what_one_change_can_save(
    sites: list[list[Choice]], max_variance: float
) -> None:
    chosen = fewest_bytes(sites, max_variance)
    stored_bytes, variance = totals(chosen)
    plans = [totals(plan) for plan in itertools.product(*sites)]
    within = [found for found in plans if found[1] <= max_variance]
    if not within:
        assert variance == pytest.approx(min(found[1] for found in plans))
        return
    assert variance <= max_variance + 1e-6
    hulls = [_hull(choices) for choices in sites]
    largest = max((b.stored_bytes - a.stored_bytes for hull in hulls for a, b in itertools.pairwise(hull)), default=0)
    assert stored_bytes <= min(found[0] for found in within) + largest


def test_what_is_left_buys_a_choice_off_the_hull() -> None:
    """The middle choice lies above the line between the others, but is all that the budget has room for."""
    site = [Choice(None, 10, 1.0), Choice(None, 20, 0.9), Choice(None, 30, 0.0)]
    assert _hull(site) == [site[0], site[2]]
    assert least_variance([site], 25) == [site[1]]


def test_equal_gains_go_to_the_first_site() -> None:
    site = [Choice(None, 1, 1.0), Choice(None, 2, 0.5)]
    assert [choice.stored_bytes for choice in least_variance([site, site], 3)] == [2, 1]


def test_the_hull_of_a_rate_law_is_all_of_it() -> None:
    choices = [Choice(None, bits, 4.0**-bits) for bits in (1, 2, 3, 4, 8)]
    assert _hull(choices) == choices
    assert math.isclose(totals(least_variance([choices] * 3, 9))[1], 3 * 4.0**-3)
