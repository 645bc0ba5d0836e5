"""Engines travel to other processes (Lightning's spawned ones) and are copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_actmem import ActMemEngine


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
@pytest.mark.parametrize("settings", [{}, {"activations": "derivative"}, {"codec": "measured", "bits": 2}])
def test_a_copy_goes_on_where_the_original_stopped(
    settings: dict[str, Any], travel: Callable[[ActMemEngine], ActMemEngine]
) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()), torch.randn(64, 64)

    def gradient(engine: ActMemEngine) -> torch.Tensor:
        with engine.compress(model, inputs=x):
            loss = model(x * 1).square().sum()
        return torch.autograd.grad(loss, model[0].weight)[0]

    engine = ActMemEngine(**settings)
    engine.rank = 3
    gradient(engine)
    other = travel(engine)
    assert (other.config, other.rank, other.step) == (engine.config, 3, 1)
    assert torch.equal(gradient(other), gradient(engine))
