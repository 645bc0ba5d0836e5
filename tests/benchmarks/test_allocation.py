"""The allocation benchmark on a model that takes no time."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.nn.functional as F

from benchmarks import allocation
from benchmarks.gradient_error import Batch, Task
from tests import models


def task() -> Task:
    model = models.mlp(depth=2)

    def batch() -> Batch:
        return torch.randn(256, 128), torch.arange(256) % 10

    return model, batch, lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def test_every_row_is_printed_and_the_allocation_wins(capsys: pytest.CaptureFixture[str]) -> None:
    allocation.table("MLP", task(), argparse.Namespace(draws=3, adaptations=2))
    lines = capsys.readouterr().out.strip().splitlines()
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in lines)}
    variances = {name: float(cells[2]) for name, cells in rows.items() if "2 bits" in name}
    assert len(rows) == 2 + len(allocation.UNIFORM) + len(allocation.PUBLISHED) + 3
    assert (
        variances["actmem, 2 bits per stored element"]
        < variances["uniform 2 bits"]
        < variances["uniform 2 bits, min-max SR"]
    )
    for name, cells in rows.items():
        if name not in ("MLP", "---"):
            assert float(cells[3]) == pytest.approx(float(cells[2]), rel=0.3)
