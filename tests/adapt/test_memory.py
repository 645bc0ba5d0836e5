"""Measuring takes no more memory than a training step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lightning_actmem import ActMemEngine
from tests import models


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest number of bytes allocated above what is there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    )
    return max(accumulate(nbytes for _, nbytes in changes), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt2"])
def test_an_adaptation_stays_below_a_training_step(name: str) -> None:
    """A ResNet's parts are quarters, for the sake of its batch statistics; the others' are eighths."""
    if name == "mlp":
        model: nn.Module = models.mlp()
        x, parts = torch.randn(1024, 128), 8
    elif name == "gpt2":
        model, parts = models.gpt2(), 8
        x = torch.randint(0, 256, (32, 64))
    else:
        model, parts = models.ResNet((1, 1), width=16, classes=10), 4
        x = torch.randn(32, 3, 32, 32)
    y = torch.arange(len(x)) % 10
    engine = ActMemEngine(bits=2, adapt=True)

    def loss(part: slice) -> Tensor:
        if name == "gpt2":
            return model(input_ids=x[part], labels=x[part]).loss
        return F.cross_entropy(model(x[part]), y[part])

    def train() -> None:
        with engine.compress(model, inputs=(x, y)):
            value = loss(slice(None))
        value.backward()

    def adapt() -> None:
        size = len(x) // parts
        slices = [slice(0, size), slice(size, 2 * size)]
        assert engine.adapter is not None
        engine.adapter.measure(
            model,
            [lambda part=part: loss(part) for part in slices],
            inputs=[(x[part], y[part]) for part in slices],
            max_passes=8,
        )
        engine.adapter.allocate()

    train()  # the gradients have to be there
    trained = peak_bytes(train)
    assert peak_bytes(adapt) <= trained
    assert engine.adapter is not None
    assert engine.adapter.probe_bytes <= engine.ledger.peak_saved_bytes
