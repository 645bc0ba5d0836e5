"""A small residual network that learns to read the handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn

from batches import Batches

VALIDATION_IMAGES = 360
LEARNING_RATE = 1e-3


def digit_batches(batch_size: int, seed: int) -> tuple[Batches, Batches]:
    """Split the 1,797 images of 8 x 8 pixels.

    Args:
        batch_size: Images per training batch.
        seed: Seed of the training order.

    Returns:
        Training batches, and validation batches of the last images.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    return (
        Batches(images[:-VALIDATION_IMAGES], labels[:-VALIDATION_IMAGES], batch_size, shuffle_seed=seed),
        Batches(images[-VALIDATION_IMAGES:], labels[-VALIDATION_IMAGES:], VALIDATION_IMAGES // 2),
    )


def conv_bn(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels_out)
    )


class ResidualBlock(nn.Module):
    """Two convolutions, each with batch normalisation, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_bn(channels, channels)
        self.second = conv_bn(channels, channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.second(self.relu(self.first(x))))


class DigitsModel(LightningModule):
    """A residual network of convolution, batch normalisation and ReLU. Nothing in here knows of compression.

    Args:
        width: Channels at full resolution; twice as many at half of it.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_bn(1, width),
            nn.ReLU(inplace=True),
            ResidualBlock(width),
            ResidualBlock(width),
            conv_bn(width, 2 * width, stride=2),
            nn.ReLU(inplace=True),
            ResidualBlock(2 * width),
            ResidualBlock(2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(2 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten digits: ``[batch, 1, 8, 8]`` to ``[batch, 10]``."""
        return self.layers(images)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
