"""The search for the largest batch, on memory functions that can be written down."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem.predict import BatchSearch
from lightning_actmem.trial import Line, Trial

MIB = 2**20


def true_largest(peak: Callable[[int], float], budget: int, limit: int = 1 << 22) -> int:
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= budget else (low, middle)
    return low


def trial_of(peak: Callable[[int], float], resting: float, real: float | None = None) -> Callable[[int], Trial]:
    """A measure; above `real` bytes memory runs out."""

    def measure(batch_size: int) -> Trial:
        needed = peak(batch_size)
        if real is not None and needed > real:
            return Trial(batch_size, 0, out_of_memory=True)
        return Trial(batch_size, round(needed), round(resting))

    return measure


memory = st.fixed_dictionaries(
    {
        "weights": st.integers(0, 64 * MIB),
        "gradients": st.floats(0, 1),
        "optimizer": st.floats(0, 4),
        "slope": st.integers(64, 2 * MIB),
    }
)


@given(memory, st.integers(70 * MIB, 1024 * MIB), st.floats(0.85, 1.5))
def test_what_is_found_fits_and_is_nearly_the_largest(model, budget, real_share):
    """Peak: the larger of the optimizer's step and of forward and backward. Memory may run out before the budget."""
    resting = model["weights"]

    def peak(batch_size: int) -> float:
        return max(resting * (1 + model["optimizer"]), resting * (1 + model["gradients"]) + model["slope"] * batch_size)

    real = budget * real_share
    largest = true_largest(peak, min(budget, real))
    search = BatchSearch(budget, max_trials=20)
    found = search.run(trial_of(peak, resting, real))
    if largest == 0:
        assert found is None
        return
    assert found is not None
    assert peak(found) <= min(budget, real)
    assert found >= 0.85 * largest or found >= largest - 2 or (real < budget and found >= 0.6 * largest)


@given(memory, st.integers(200 * MIB, 1024 * MIB))
def test_four_trials_are_enough_where_the_budget_is_what_there_is(model, budget):
    resting = 4 * MIB + model["weights"]

    def peak(batch_size: int) -> float:
        return resting * (1 + model["gradients"]) + model["slope"] * batch_size

    search = BatchSearch(budget)
    found = search.run(trial_of(peak, resting))
    assert len(search.trials) <= 4
    assert found is not None
    assert found >= 0.95 * true_largest(peak, budget) - 1
    assert peak(found) <= budget


@pytest.mark.parametrize("runs_out", [False, True])
@pytest.mark.parametrize("dearer", [1.1, 1.3, 1.5, 2])
def test_samples_that_take_more_in_larger_batches(dearer, runs_out):
    """Padding to the longest sample: the second trial is above the budget, measured or out of memory."""
    budget, resting = 200 * MIB, 10 * MIB

    def peak(batch_size: int) -> float:
        return resting + 100_000 * batch_size * (1 + (dearer - 1) * min(1, (batch_size - 8) / 100))

    search = BatchSearch(budget)
    found = search.run(trial_of(peak, resting, budget if runs_out else None))
    assert len(search.trials) <= 4
    assert found is not None
    assert 0.95 * true_largest(peak, budget) <= found <= true_largest(peak, budget)


def test_a_first_trial_that_was_measured_too_low():
    def peak(batch_size: int) -> float:
        return 10_000_000 + 100_000 * batch_size - (500_000 if batch_size == 8 else 0)

    search = BatchSearch(200_000_000)
    assert search.run(trial_of(peak, 10_000_000)) in range(1850, 1901)
    assert len(search.trials) <= 4


def test_data_that_gives_fewer_samples_each_time_comes_to_an_end():
    given = iter(range(1000, 0, -1))
    calls = []

    def measure(batch_size: int) -> Trial:
        samples = min(batch_size, next(given))
        calls.append(samples)
        out_of_memory = batch_size > 900
        return Trial(
            batch_size, 0 if out_of_memory else 1000 * samples, 100, None, out_of_memory, samples - len(calls) % 3
        )

    search = BatchSearch(2_000_000)
    search.run(measure)
    assert len(search.trials) <= search.max_trials


def test_a_line_says_what_is_fixed_and_what_grows():
    search = BatchSearch(1000 * 100)
    assert search.run(trial_of(lambda b: 5000 + 100 * b, 4000)) in range(931, 951)
    assert search.line == Line(5000, 100)
    assert "4.9 KiB fixed and 100 B per sample" in search.explain()


@pytest.mark.parametrize("limit", [1, 5, 8, 100])
def test_the_number_of_samples_is_a_limit(limit):
    search = BatchSearch(MIB, limit=limit)
    assert search.run(trial_of(lambda b: 100 + b, 50)) == limit


def test_data_that_runs_out_is_a_limit():
    def measure(batch_size: int) -> Trial:
        return Trial(batch_size, 100 + 10 * min(batch_size, 20), 50, samples=20 if batch_size > 20 else None)

    search = BatchSearch(MIB)
    assert search.run(measure) == 20
    assert search.limit == 20


def test_too_little_memory_for_one_sample():
    search = BatchSearch(1000)
    assert search.run(trial_of(lambda b: 2000 + b, 900)) is None
    assert [trial.batch_size for trial in search.trials] == [8, 2, 1]


def test_a_start_that_does_not_fit():
    search = BatchSearch(1000, start=64)
    assert search.run(trial_of(lambda b: 100 + 100 * b, 100)) in (8, 9)


def test_memory_that_does_not_grow():
    search = BatchSearch(MIB, limit=10_000)
    assert search.run(trial_of(lambda b: 5000, 4000)) is not None
    assert not search.grows


def test_growth_is_seen_where_the_first_trial_took_more_than_the_next():
    """It pays for what is made once (seen with LBFGS): a batch of 100 that ran was given up."""
    peaks = {8: 4_200_000, 16: 3_900_000, 38: 3_900_000, 100: 4_000_000}
    search = BatchSearch(8 * MIB)
    search.trials += [Trial(size, peak) for size, peak in peaks.items()]
    assert (search.grows, search.best) == (True, 100)


@pytest.mark.parametrize("budget", [6, 7, 8, 10, 12, 16, 20, 40])
@pytest.mark.parametrize("optimizer", [0.5, 1.0, 1.5, 2.5])
def test_the_optimizers_step_hides_nothing_where_moments_are_told_apart(optimizer, budget):
    """It is the peak of small batches: the line through two of them is flat, and one through its end is too flat."""

    def moments(batch_size: int) -> tuple[int, ...]:
        rest = 1.4 * MIB
        forward, backward = rest + 0.4 * MIB + 4500 * batch_size, rest + 0.2 * MIB + 5000 * batch_size
        return round(forward), round(backward), round(rest + optimizer * MIB)

    search = BatchSearch(budget * MIB)
    found = search.run(lambda size: Trial(size, max(moments(size)), round(1.4 * MIB), moments=moments(size)))
    largest = true_largest(lambda size: max(moments(size)), budget * MIB)
    assert len(search.trials) <= 4
    assert found is not None
    assert 0.94 * largest <= found <= largest


@pytest.mark.parametrize("budget", [7, 8, 10, 12, 16, 20, 40])
def test_beyond_the_optimizers_step_the_last_trial_does_not_go_too_far(budget):
    """The line through one batch below the end of that step and one above it is too flat, and no trial is left."""
    resting = 1.4 * MIB

    def peak(batch_size: int) -> float:
        return max(resting + MIB, resting + 0.4 * MIB + 4500 * batch_size)

    search = BatchSearch(budget * MIB)
    found = search.run(trial_of(peak, resting))
    assert len(search.trials) <= 4
    assert found is not None
    assert 0.7 * true_largest(peak, budget * MIB) <= found <= true_largest(peak, budget * MIB)


@pytest.mark.parametrize("stored", [(900, 900), (900, 200)])
def test_bytes_stored_per_sample_are_told_only_where_they_grow(stored):
    search = BatchSearch(MIB)
    search.trials += [Trial(8, 1000, stored_bytes=stored[0]), Trial(16, 2000, stored_bytes=stored[1])]
    assert "per sample; budget" in search.explain()
    search.trials.append(Trial(32, 4000, stored_bytes=stored[1] + 1600))
    assert "(100 B of it stored for the backward pass)" in search.explain()


def test_out_of_memory_below_the_budget_backs_off():
    """A device that gives only half of what it promised."""
    search = BatchSearch(2000 * 100, max_trials=8)
    found = search.run(trial_of(lambda b: 5000 + 100 * b, 4000, real=100_000))
    assert found is not None
    assert 0.8 * 950 <= found <= 950


@pytest.mark.parametrize("max_trials", [4, 12])
@pytest.mark.parametrize("left_behind", [0.03, 0.2, 0.5])
def test_what_is_found_still_runs_after_memory_has_run_out(left_behind, max_trials):
    """Steps that failed for lack of memory left some of it in use, and a batch that ran before them failed in `fit`.

    Where no trial is left to run it once more, the last one that ran stands.
    """
    left = {"bytes": 100_000.0}

    def peak(batch_size: int) -> float:
        return 5000 + 100 * batch_size + (0.002 * batch_size**2 if batch_size > 400 else 0)

    def measure(batch_size: int) -> Trial:
        if peak(batch_size) > left["bytes"]:
            left["bytes"] = 100_000 * (1 - left_behind)
            return Trial(batch_size, 0, 4000, out_of_memory=True)
        return Trial(batch_size, round(peak(batch_size)), 4000)

    search = BatchSearch(110_000, max_trials=max_trials)
    found = search.run(measure)
    assert any(trial.out_of_memory for trial in search.trials)
    assert len(search.trials) <= max_trials
    assert found == search.best
    if max_trials > 4:
        assert peak(found) <= left["bytes"]
        assert not search.trials[-1].out_of_memory


def test_the_number_of_trials_is_a_limit_even_where_all_but_one_fail():
    """The largest batch that ran stands."""

    def measure(batch_size: int) -> Trial:
        out_of_memory = batch_size > 100
        return Trial(batch_size, 0 if out_of_memory else 1000 * batch_size, 100, out_of_memory=out_of_memory)

    search = BatchSearch(1_000_000)
    found = search.run(measure)
    assert len(search.trials) == 4
    assert found == max(trial.batch_size for trial in search.trials if not trial.out_of_memory)


@pytest.mark.parametrize("real", [20, 60, 100, 300])
def test_a_device_that_has_far_less_than_it_said(real):
    search = BatchSearch(10_000)
    found = search.run(trial_of(lambda b: 100 + 10 * b, 50, real=100 + 10 * real))
    assert len(search.trials) == 4
    assert found is not None
    assert real / 6 <= found <= real


def test_while_nothing_fits_trials_go_on():
    search = BatchSearch(1000, start=4096)
    assert search.run(trial_of(lambda b: 100 + 100 * b, 100)) in (4, 8)
    assert len(search.trials) == 6


def test_after_memory_has_run_out_the_next_batch_is_clearly_smaller():
    search = BatchSearch(200 * MIB)
    search.trials += [Trial(8, 8 * MIB, MIB), Trial(100, 100 * MIB, MIB), Trial(195, 0, MIB, out_of_memory=True)]
    assert search.next() in range(175, 186)


def test_a_peak_that_scatters_may_exceed_the_budget_a_little():
    for spread_bytes, found in ((0, 100), (5 * MIB, 198)):
        search = BatchSearch(200 * MIB, spread_bytes=spread_bytes)
        search.trials += [Trial(100, 100 * MIB, MIB), Trial(198, 203 * MIB, MIB)]
        assert search.best == found


@pytest.mark.parametrize(("resting", "expected"), [(1, int(1.1 * 199 / 0.13)), (2, int(198 / 0.12))])
def test_how_far_a_line_is_trusted_beyond_the_safe_one(resting, expected):
    """Further where the small batch took so much that it cannot have been the optimizer's step alone."""
    search = BatchSearch(200 * MIB)
    search.trials += [Trial(size, int((4 + 0.1 * size) * MIB), resting * MIB) for size in (8, 100)]
    assert search.next() in range(expected - 2, expected + 1)


# Residual blocks at 4 bits on a CPU: temporaries stop growing at 256 samples, and then another moment is the peak.
BENT = (
    (8, 1.527),
    (64, 4.224),
    (200, 11.521),
    (256, 14.525),
    (300, 16.108),
    (400, 19.706),
    (736, 32.932),
    (2048, 90.228),
)


def test_a_bend_is_taken_into_account_before_the_last_trial():
    def peak(batch_size: int) -> float:
        index = max(1, sum(size < batch_size for size, _ in BENT[:-1]))
        (first, low), (second, high) = BENT[index - 1 : index + 1]
        return MIB * (low + (high - low) * (batch_size - first) / (second - first))

    for budget in range(10, 85, 3):
        search = BatchSearch(budget * MIB)
        found = search.run(trial_of(peak, 0.77 * MIB, real=0.99 * budget * MIB))
        assert len(search.trials) <= 4
        assert found is not None
        assert found >= 0.95 * true_largest(peak, int(0.99 * budget * MIB))
