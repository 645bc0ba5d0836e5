"""Prints the relative error of the gradient by codec and bits, bias and variance apart, as a table in Markdown.

Run ``python -m benchmarks.gradient_error``; each cell appends a row to ``gradient_error.csv``. A small GPT learns the
texts of Python's ``help()``, a small ResNet the digits that ship with scikit-learn, plainly and for some steps:
activations at random initialisation are unlike those of a net that has learned something. Then everything is packed at
the same bits (queries, keys and values too), several times with other noise: ``|E g' - g|^2`` and ``E|g' - E g'|^2``
over ``|g|^2``, the first corrected for the variance of the mean that stands for ``E g'``. The GPT recomputes attention
in every row, for which derivation is needed; the ResNet derives in the rows that say so. ReLU outputs have their own
code in every row, of 2 bits at least: their exact sign is their derivative.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.convergence import BATCH, CONTEXT, CharacterModel, append, encode, windows
from benchmarks.results import environment
from lightning_actmem import ActMemEngine
from lightning_actmem.saved.site import Site
from lightning_actmem_kernels import CodecSpec
from lightning_actmem_kernels.spec import WIDTHS as CODEC_WIDTHS

CODECS: dict[str, dict[str, Any]] = {
    "min-max, stochastic rounding": {"codec": "uniform", "rounding": "stochastic"},
    "min-max, nearest": {"codec": "uniform", "rounding": "nearest"},
    "min-max, subtractive dither": {"codec": "uniform"},
    "rotated": {"codec": "rotated", "rotated": {"centre": False}},
    "rotated, mean removed": {"codec": "rotated", "rotated": {"centre": True}},
    "rotated, mean removed, groups of 512": {"codec": "rotated", "rotated": {"centre": True, "group_size": 512}},
    "block floating point, dither": {"codec": "bfp"},
    "float8 e4m3, stochastic rounding": {"codec": "fp8_e4m3"},
    "float8 e5m2, stochastic rounding": {"codec": "fp8_e5m2"},
    "auto": {"codec": "auto"},
    "measured": {"codec": "measured"},
    "auto, derived": {"codec": "auto", "derive": True},
}
WIDTHS = (1, 2, 3, 4, 8)
LEARNING_RATE = 1e-3
DIGITS_BATCH = 64
Batch = tuple[Tensor, Tensor]
Task = tuple[nn.Module, Callable[[], Batch], Callable[[Batch], Tensor]]


class Error(NamedTuple):
    """The error of the gradient, over its squared size.

    Args:
        squared_bias: Unbiased estimate, which may fall below zero.
        variance: Unbiased estimate.
        stored_bytes: Bytes stored for backward.
    """

    squared_bias: float
    variance: float
    stored_bytes: int


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


class Rotated(dict[Site, CodecSpec | None]):
    """A plan that changes the parameters of every rotated site, and nothing else."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__()
        self.parameters = parameters

    def __bool__(self) -> bool:
        return True  # it has an answer for sites that it does not list

    def get(self, site: Site, default: Any = None) -> Any:
        is_rotated = isinstance(default, CodecSpec) and default.codec == "rotated"
        return dataclasses.replace(default, **self.parameters) if is_rotated else default


def gpt() -> Task:
    """A character transformer on Python's help texts."""
    ids, characters = encode("\n\n".join(topics[name] for name in sorted(topics)))
    model = CharacterModel(characters).eval()  # no dropout: every run must have the same exact gradient
    return (
        model,
        lambda: windows(ids, torch.randint(len(ids) - CONTEXT - 1, (BATCH,))),
        lambda batch: model(*batch),
    )


def resnet() -> Task:
    """Six residual blocks on handwritten digits, enlarged to 16 x 16 pixels."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *(Residual(32) for _ in range(6)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 16, scale_factor=2.0)

    def batch() -> Batch:
        chosen = torch.randint(len(images), (DIGITS_BATCH,))
        return images[chosen], labels[chosen]

    return model, batch, lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def trained(build: Callable[[], Task], steps: int) -> Task:
    """Build a net and train it plainly."""
    torch.manual_seed(0)
    task = model, new_batch, loss_of = build()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(new_batch()).backward()
        optimizer.step()
    return task


def gradient(task: Task, batch: Batch, engine: ActMemEngine | None) -> Tensor:
    model, _, loss_of = task
    with contextlib.nullcontext() if engine is None else engine.compress(model, inputs=batch):
        loss = loss_of(batch)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]).double()


def measure(task: Task, batch: Batch, draws: int, bits: int, settings: dict[str, Any]) -> Error:
    """Return squared bias and variance of the gradient with everything packed at these bits."""
    exact = gradient(task, batch, None)
    config = {name: value for name, value in settings.items() if name != "rotated"}
    engine = ActMemEngine(config, bits=bits, attention_bits=bits, min_elements=0)
    if "rotated" in settings:
        engine._store.plan = Rotated(settings["rotated"])
    if settings["codec"] == "measured":
        gradient(task, batch, engine)  # the step that measures
    draws = 1 if settings.get("rounding") == "nearest" else draws
    errors = torch.stack([gradient(task, batch, engine) - exact for _ in range(draws)])
    size = exact.square().sum()
    variance = errors.var(0).sum() / size if draws > 1 else torch.tensor(0.0)
    squared_bias = errors.mean(0).square().sum() / size - variance / draws
    return Error(float(squared_bias), float(variance), engine.report(table=False).saved_bytes)


def has_width(codec: str, bits: int) -> bool:
    """Whether the codec itself has this width."""
    return bits in CODEC_WIDTHS.get(codec, WIDTHS)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("GPT", "ResNet"), default=("GPT", "ResNet"))
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), default=list(CODECS))
    parser.add_argument("--bits", nargs="+", type=int, choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--draws", type=int, default=8, help="of the noise, two or more")
    parser.add_argument("--warmup", type=int, default=150, help="training steps before measuring")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("gradient_error.csv"))
    options = parser.parse_args(arguments)
    if options.draws < 2:
        parser.error(f"--draws must be 2 or more, got {options.draws}: one draw has no variance.")
    for name in options.models:
        task = trained({"GPT": gpt, "ResNet": resnet}[name], options.warmup)
        batch = task[1]()
        print(f"\n| {name}: squared bias + variance | " + " | ".join(f"{bits} bit" for bits in options.bits) + " |")
        print("|---" * (1 + len(options.bits)) + "|")
        for codec in options.codecs:
            cells = []
            for bits in options.bits:
                settings = {"derive": name == "GPT", **CODECS[codec]}
                if not has_width(settings["codec"], bits):
                    cells.append("")
                    continue
                error = measure(task, batch, options.draws, bits, settings)
                row = {"model": name, "codec": codec, "bits": bits, "warmup": options.warmup, "draws": options.draws}
                append(options.csv, {**environment(torch.device("cpu")), **row, **error._asdict()})
                cells.append(f"{max(error.squared_bias, 0.0):.1e} + {error.variance:.1e}")
            print(f"| {codec} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
