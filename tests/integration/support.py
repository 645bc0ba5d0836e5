"""Models, data and trainers for the Lightning tests: tiny, and with everything that trips up saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

FEATURES = 16
WIDTH = 32
CLASSES = 4
PACK_ALL: dict[str, Any] = {"min_elements": 0, "group_size": 32}  # the tensors here are smaller than the defaults want
BAREBONES: dict[str, Any] = {"barebones": True, "num_sanity_val_steps": None}  # Lightning refuses a number, even 0


def hooks_active() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def dataset(samples: int) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(0, CLASSES, (samples,), generator=generator))


class Net(LightningModule):
    """A small classifier with dropout (so that a shifted random stream is seen) that notes what runs compressed."""

    def __init__(self, lr: float = 0.1, batch_size: int = 8, samples: int = 400) -> None:
        super().__init__()
        self.lr = lr
        self.batch_size = batch_size
        self.samples = samples
        self.seen: list[tuple[str, bool]] = []
        self.net = nn.Sequential(
            nn.Linear(FEATURES, WIDTH),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def note(self, step: str) -> None:
        self.seen.append((step, hooks_active()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("train")
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("validate")
        with torch.enable_grad():
            self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note("predict")
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(dataset(self.samples), batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class ManualNet(Net):
    """Two optimizers, each with its own closure-free step in every batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.note("train")
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        half = len(self.net) // 2
        return [torch.optim.SGD(part.parameters(), lr=self.lr) for part in (self.net[:half], self.net[half:])]


class LbfgsNet(Net):
    """Calls ``training_step`` several times per batch."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=self.lr, max_iter=3)


class IteratorNet(Net):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
        self.note("train")
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


def new_trainer(**arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "max_steps": 3,
    }
    return Trainer(**{**quiet, **arguments})


def fit(model: Net | None = None, **arguments: Any) -> Trainer:
    """Build a model from seed 0 unless one is given, and train it."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    trainer = new_trainer(**arguments)
    torch.manual_seed(1)
    trainer.fit(model)
    return trainer


def weights(module: nn.Module | None) -> dict[str, Tensor]:
    assert module is not None
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_bit_equal(actual: nn.Module | None, expected: nn.Module | None) -> None:
    torch.testing.assert_close(weights(actual), weights(expected), rtol=0, atol=0)


def is_untouched(trainer: Trainer) -> bool:
    """Whether no trace of a run is left on strategy, model or autograd."""
    model = trainer.lightning_module
    shadowed = vars(trainer.strategy).keys() & {"training_step", "teardown"}
    forwards = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return not shadowed and not forwards and not hooks_active()
