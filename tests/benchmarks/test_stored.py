"""What residual networks store at 2 bits everywhere: the figures that the documentation promises."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.stored import CONFIGURATIONS, MODELS, ratio


@pytest.mark.parametrize(("name", "least"), [("ResNet-50", 24), ("ResNet-18", 22)])
def test_residual_networks_at_2_bits(name: str, least: float) -> None:
    torch.manual_seed(0)
    model, inputs, step = MODELS[name]()
    assert ratio(model, inputs, step, False, CONFIGURATIONS["2 bits, no floor"])[1] >= least
