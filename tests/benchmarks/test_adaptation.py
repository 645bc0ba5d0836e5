"""The benchmark of what adapting costs counts every adaptation and every check, and fills its table."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.adaptation import measure, row


@pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_row_of_the_table():
    found = measure("mlp", batch=64, batches=30)
    assert len(found.step_s) == 30
    assert len(found.adaptation_s) == 1
    # At the batch after, and 16 batches later.
    assert 2 <= len(found.check_s) == len(found.adaptation.history) - 1
    assert found.step_bytes > found.probe_bytes > 0
    figures = row("mlp", 64, found)
    assert (figures["model"], figures["batch"]) == ("mlp", 64)
    assert (figures["stored_bytes"], figures["probe_bytes"]) == (found.step_bytes, found.probe_bytes)
    assert figures["checks"] == len(found.check_s)
    spent_s, step_s = sum(found.adaptation_s + found.check_s), statistics.median(found.step_s)
    assert float(figures["percent_of_1000_steps"]) == pytest.approx(spent_s / step_s / 10, abs=0.006)
