"""Models whose batch size can be set and that note the sizes they are trained with, and the peak of a batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_actmem import ActMem, ActMemBatchSizeFinder
from lightning_actmem.integration.batch_size import engine_of
from lightning_actmem.integration.trials import BatchTrials
from tests.integration.support import CLASSES, FEATURES, WIDTH, Net, fit
from tests.models import MlpBlock


class SizedNet(Net):
    """Notes the size of every batch that it is trained with."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(samples=4096, **kwargs)
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("train")
        self.sizes.append(len(batch[0]))
        return self.loss(batch)


class Mlp(SizedNet):
    """Residual blocks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(*(MlpBlock(FEATURES) for _ in range(6)), nn.Linear(FEATURES, CLASSES))


class Convolutions(SizedNet):
    """Convolutions with batch norm and ReLU, trained by Adam."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)),
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, CLASSES),
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Attention(SizedNet):
    """A transformer layer over features taken as tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Unflatten(1, (FEATURES, 1)),
            nn.Linear(1, WIDTH),
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True),
            nn.Flatten(),
            nn.Linear(FEATURES * WIDTH, CLASSES),
        )


def measured_peak(model: SizedNet, batch_size: int, **settings: Any) -> int:
    """The peak of steps with this batch size."""
    peaks = []

    class Measuring(ActMemBatchSizeFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            with BatchTrials(trainer, engine=engine_of(trainer)) as trials:
                peaks.append(trials.run(batch_size).peak_bytes)

    callbacks = [ActMem(**settings, summary=False)] if settings else []
    fit(model, callbacks=[*callbacks, Measuring()], max_steps=1)
    return peaks[0]
