"""Prints the relative error of the gradient by codec and bits, bias and variance apart, as a table in Markdown.

Run ``python -m benchmarks.gradient_error``. A small GPT and a small ResNet are trained plainly for some steps first:
activations at random initialisation are unlike those of a net that has learned something. Then everything is packed at
the same bits (no floors), several times with other noise: ``|E g' - g|^2`` and ``E|g' - E g'|^2`` over ``|g|^2``. The
GPT recomputes attention in every row, for which derivation is needed; the ResNet derives in the last row only. ReLU
outputs have their own code in every row: their exact sign is their derivative.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.convergence import BATCH, CONTEXT, CharacterModel
from lightning_actmem import ActMemEngine

CODECS: dict[str, dict[str, Any]] = {
    "min-max, stochastic rounding": {"codec": "uniform", "rounding": "stochastic"},
    "min-max, nearest": {"codec": "uniform", "rounding": "nearest"},
    "min-max, subtractive dither": {"codec": "uniform"},
    "rotated": {"codec": "rotated"},
    "auto": {"codec": "auto"},
    "auto, derived": {"codec": "auto", "derive": True},
}
WIDTHS = (1, 2, 3, 4, 8)
Batch = tuple[Tensor, Tensor]
Task = tuple[nn.Module, Callable[[], Batch], Callable[[Batch], Tensor]]


class Residual(nn.Module):
    """Two convolutions with batch norm around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def gpt() -> Task:
    """A character transformer on rising sequences, new ones in each step."""
    model = CharacterModel(64).eval()  # no dropout: every run must have the same exact gradient

    def batch() -> Batch:
        ids = torch.randint(0, 64, (BATCH, CONTEXT + 1)).sort(1).values
        return ids[:, :-1], ids[:, 1:]

    return model, batch, lambda batch: model(*batch)


def resnet() -> Task:
    """Six residual blocks on noise around ten class means, new noise in each step."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *(Residual(32) for _ in range(6)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    labels = torch.arange(64) % 10
    means = torch.randn(10, 3, 16, 16)[labels]
    return (
        model,
        lambda: (means + 2 * torch.randn(64, 3, 16, 16), labels),
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
    )


def gradient(task: Task, batch: Batch, engine: ActMemEngine | None) -> Tensor:
    model, _, loss_of = task
    with contextlib.nullcontext() if engine is None else engine.compress(model, inputs=batch):
        loss = loss_of(batch)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]).double()


def bias_and_variance(task: Task, batch: Batch, draws: int, config: dict[str, Any]) -> tuple[float, float]:
    """Return squared bias and variance of the gradient, relative to its squared size."""
    exact = gradient(task, batch, None)
    engine = ActMemEngine(config, attention_bits=config["bits"], min_elements=0)
    errors = torch.stack([gradient(task, batch, engine) - exact for _ in range(draws)])
    size = exact.square().sum()
    variance = errors.var(0).sum() / size
    return float(errors.mean(0).square().sum() / size - variance / draws), float(variance)


def main() -> None:
    """Train, measure, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=150, help="training steps before measuring")
    options = parser.parse_args()
    for name, build in {"GPT": gpt, "ResNet": resnet}.items():
        torch.manual_seed(0)
        task = model, new_batch, loss_of = build()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(options.warmup):
            optimizer.zero_grad()
            loss_of(new_batch()).backward()
            optimizer.step()
        batch = new_batch()
        print(f"\n| {name}: squared bias + variance | " + " | ".join(f"{bits} bit" for bits in WIDTHS) + " |")
        print("|---" * (1 + len(WIDTHS)) + "|")
        for codec, config in CODECS.items():
            cells = []
            for bits in WIDTHS:
                settings = {"derive": name == "GPT", **config, "bits": bits}
                bias, variance = bias_and_variance(task, batch, options.draws, settings)
                cells.append(f"{max(bias, 0.0):.1e} + {variance:.1e}")
            print(f"| {codec} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
