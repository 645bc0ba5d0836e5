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
    cells = row("mlp", 64, found).strip("| ").split(" | ")
    assert len(cells) == 8
    assert cells[:2] == ["mlp", "64"]
    assert cells[-2:] == [f"{found.step_bytes:,}", f"{found.probe_bytes:,}"]
