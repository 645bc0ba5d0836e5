"""What an adapter predicts for a whole plan, against what the plan does, on models that have learned something."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.adapt.measurement import Measurement
from tests import models

TOLERANCE = 0.1
# By then the standard error of the measured mean is some 2 %.
CHECKS = 12
CHECK_PASSES = 5
STEPS = 40
Batch = tuple[Tensor, Tensor]
Task = tuple[nn.Module, Batch, Callable[[Batch], Tensor]]


def gpt2() -> Task:
    """Sequences that rise by a step of their own."""
    model = models.gpt2()
    ids = (torch.arange(16)[:, None] + torch.arange(64) * (1 + torch.arange(16)[:, None] % 5)) % 256
    return model, (ids, ids), lambda batch: model(input_ids=batch[0], labels=batch[1]).loss


def bert_with_dropout() -> Task:
    """Whether a sequence holds more large numbers than small ones."""
    model = models.bert(dropout=0.1)
    assert any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in model.modules())
    ids = torch.randint(0, 256, (32, 64))
    labels = (ids.float().mean(1) > 127.5).long()
    return model, (ids, labels), lambda batch: model(input_ids=batch[0], labels=batch[1]).loss


def resnet_with_batch_norm() -> Task:
    """Which of four colours an image leans to."""
    model, labels = models.ResNet((1, 1), width=16, classes=4), torch.arange(32) % 4
    images = torch.randn(32, 3, 32, 32) + torch.randn(4, 3)[labels, :, None, None]
    return model, (images, labels), lambda batch: F.cross_entropy(model(batch[0]), batch[1])


TASKS = {"gpt2": gpt2, "bert with dropout": bert_with_dropout, "resnet with batch norm": resnet_with_batch_norm}


def train(model: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses: list[float] = []
    for _ in range(STEPS):
        value = loss(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", TASKS)
def test_the_predicted_variance_is_the_measured_one(name: str, bits: int) -> None:
    """One measured width of each codec, the rate table and the closed form tell what the whole plan adds."""
    model, batch, loss = TASKS[name]()
    train(model, batch, loss)
    engine = ActMemEngine(bits=bits, adapt=True)
    adapter = engine.adapter
    assert adapter is not None
    first, second = ((a, b) for a, b in zip(*(tensor.chunk(4)[:2] for tensor in batch), strict=True))

    def run(part: Batch) -> Tensor:
        torch.manual_seed(0)  # the same dropout every time
        return loss(part)

    def measure(max_passes: int) -> Measurement:
        closures = [partial(run, first), partial(run, second)]
        return adapter.measure(model, closures, inputs=[first, second], max_passes=max_passes)

    measure(120)
    assert all(
        adapter.sensitivities.variance(site, use.default) is not None for site, use in adapter.sizes.uses.items()
    )
    assert adapter.predicted_noise is not None
    predicted = adapter.predicted_noise * adapter.gradient_variance
    totals = [total for _ in range(CHECKS) for total in measure(CHECK_PASSES).totals]
    assert predicted == pytest.approx(sum(totals) / len(totals), rel=TOLERANCE)
