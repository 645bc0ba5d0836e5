"""Adaptation where a loss divides by what follows from a sigmoid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapt.test_adapter import Training, sure


class Dividing(Training):
    """The loss divides by what follows from a sigmoid, most of which have come near 0 or 1."""

    def loss(self, part: slice) -> Callable[[], Tensor]:
        return lambda: -torch.log(1 - torch.sigmoid(20 * self.model(self.x[part])) + 1e-8).mean()


@pytest.mark.parametrize("goal", [{"noise": 0.05}, {"budget": "90kB"}], ids=str)
def test_what_stays_exact_for_a_division_is_neither_measured_nor_counted_as_rounded(goal: dict[str, Any]) -> None:
    """Its rounding was measured, 10^5 times the gradient's own variance, and its bytes went beyond the plan."""
    training = Dividing(**goal)
    sure(training)
    training.adapter.allocate()
    training.step()
    engine, adapter = training.engine, training.adapter
    assert not any(site.operation == "sigmoid" for site in engine.plan)
    (row,) = (row for row in engine.report().rows if "sigmoid" in row.operations)
    assert (row.codec, row.saved_bytes) == ("exact", row.raw_bytes)
    uses = adapter.sizes.uses
    planned = sum(use.stored_bytes(engine.plan.get(site, use.default)) for site, use in uses.items())
    assert engine.report().stored_bytes == adapter.sizes.fixed_bytes + planned
    if "budget" in goal:
        assert engine.report().stored_bytes <= 90_000
    training.measure()
    assert adapter.measured_noise is not None
    assert adapter.measured_noise < 1
