"""The peak that small batches predict is the one that a larger batch has, on five models with their real structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from lightning_actmem import ActMem
from lightning_actmem.integration.repeated import checkpointing, repeated_blocks
from lightning_actmem.integration.tracing import Tracer
from tests.models import ResNet, bert, gpt2, mlp

PEAK_ERROR = 0.05
CLASSES = 2


@dataclass(frozen=True)
class Model:
    """A model, its samples, its loss, and the smaller of the batches that predict one four times as large.

    With it the largest tensors have 2^19 elements or more, from where the temporaries of packing stop growing, or the
    batches stay below that.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    small: int


def vit() -> nn.Module:
    size = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
    return ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=4, num_labels=CLASSES)).train()


def cross_entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(x), y)


MODELS = {
    "mlp": Model(lambda: mlp(classes=CLASSES), lambda n: torch.randn(n, 128), cross_entropy, 256),
    "resnet": Model(
        lambda: ResNet((1, 2, 1, 1), width=16, classes=CLASSES), lambda n: torch.randn(n, 3, 64, 64), cross_entropy, 8
    ),
    "vit": Model(vit, lambda n: torch.randn(n, 3, 32, 32), lambda net, x, y: net(pixel_values=x, labels=y).loss, 32),
    "bert": Model(bert, lambda n: torch.randint(256, (n, 64)), lambda net, x, y: net(input_ids=x, labels=y).loss, 32),
    "gpt": Model(gpt2, lambda n: torch.randint(256, (n, 64)), lambda net, x, y: net(input_ids=x, labels=x).loss, 32),
}


class Wrapped(LightningModule):
    """One of the models, trained by AdamW."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.batch_size = model.small
        self.net = model.build()
        self.loss = model.loss
        samples = 4 * model.small
        self.data = TensorDataset(model.inputs(samples), torch.randint(CLASSES, (samples,)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net, *batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size)


def predicted_and_measured(model: Wrapped, actmem: Callable[[], ActMem | None]) -> tuple[int, int]:
    """The peak of the largest batch: by the lines through a quarter and half of it, and as it is."""
    small = model.batch_size
    predicted = (
        Tracer(model, None, (small, 2 * small), "batch_size", "cpu").trace(actmem()).envelope.peak_bytes(4 * small)
    )
    measured = Tracer(model, None, (2 * small, 4 * small), "batch_size", "cpu").trace(actmem()).trials[1].peak_bytes
    return predicted, measured


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "8 bits", "4 bits", "2 bits", "checkpoint"])
@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_peak_is_within_five_percent_of_the_measured_one(name, way):
    model = Wrapped(MODELS[name])
    with checkpointing(repeated_blocks(model) if way == "checkpoint" else {}):
        predicted, measured = predicted_and_measured(
            model, lambda: ActMem(bits=int(way[0]), summary=False) if way.endswith("bits") else None
        )
    assert predicted == pytest.approx(measured, rel=PEAK_ERROR)
