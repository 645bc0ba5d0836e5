"""The upper envelope of lines, held against their maximum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem.envelope import Envelope
from lightning_actmem.trial import Line, Trial

lines = st.lists(st.builds(Line, st.integers(-1000, 10_000), st.integers(-20, 100)), min_size=1, max_size=12)


@given(lines, st.integers(1, 5000))
def test_it_is_the_highest_line_everywhere(given_lines, batch_size):
    envelope = Envelope.above(given_lines)
    assert envelope.peak_bytes(batch_size) == max(line.peak_bytes(batch_size) for line in given_lines)
    slopes = [line.bytes_per_sample for line in envelope.lines]
    assert slopes == sorted(set(slopes))


@given(lines, st.integers(10_001, 100_000))
def test_the_largest_batch_is_the_last_one_within_the_budget(given_lines, budget):
    envelope = Envelope.above(given_lines)
    largest = envelope.largest(budget)
    if largest is None:
        assert envelope.peak_bytes(1_000_000) <= budget
    else:
        assert largest == 0 or envelope.peak_bytes(largest) <= budget
        assert envelope.peak_bytes(largest + 1) > budget


def test_another_moment_than_in_the_small_batches_is_the_peak():
    small, large = Trial(10, 1100, moments=(1100, 250)), Trial(20, 1200, moments=(1200, 500))
    envelope = Envelope.through(small, large)
    assert envelope.lines == (Line(1000, 10), Line(0, 25))
    assert envelope.peak_bytes(40) == 1400
    assert envelope.peak_bytes(100) == 2500


@pytest.mark.parametrize("moments", [(), (1200,), (1200, 500, 1)])
def test_moments_that_do_not_correspond_leave_one_line(moments):
    envelope = Envelope.through(Trial(10, 1100, moments=(1100, 250)), Trial(20, 1200, moments=moments))
    assert envelope.lines == (Line(1000, 10),)
