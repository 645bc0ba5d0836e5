"""What the models of the table store at 2 bits everywhere: the figures that the documentation promises."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.stored import CONFIGURATIONS, MODELS, bytes_by_kind, ratio

LEAST = {"ResNet-50": 24, "ResNet-18": 22, "ViT": 20, "BERT": 22, "GPT-2": 35, "Llama": 22}


@pytest.mark.parametrize("name", MODELS)
def test_times_fewer_bytes_at_2_bits(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, step = MODELS[name]()
    kinds = bytes_by_kind(model, inputs, step, False, CONFIGURATIONS["2 bits, no floor"])
    assert ratio(kinds)[1] >= LEAST[name]
