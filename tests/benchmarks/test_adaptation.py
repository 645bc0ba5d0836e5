"""The benchmark of what adapting costs counts every adaptation and every check, and fills its table."""

from __future__ import annotations

import pytest

from benchmarks.adaptation import measure, row


@pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_row_of_the_table():
    found = measure("mlp", batch=64, batches=14)
    assert len(found.step_s) == 14
    assert len(found.adaptation_s) == 2
    assert 1 <= len(found.check_s) <= len(found.adaptation.history) - 2
    assert found.step_bytes > found.probe_bytes > 0
    figures = row("mlp", 64, found)
    assert (figures["model"], figures["batch"]) == ("mlp", 64)
    assert (figures["stored_bytes"], figures["probe_bytes"]) == (found.step_bytes, found.probe_bytes)
    steps = float(figures["adaptation_steps"]) + float(figures["check_steps"])
    assert float(figures["percent_of_1000_steps"]) == pytest.approx(steps / 10, abs=0.02)
