"""Trains two small models on real data, plain and with activations stored in 4 bits, and compares them in one table.

Run ``python examples/demo.py`` (about two minutes). Everything that ActMem needs of a user is in `TASKS`:
one callback for the network of digits, one strategy name for the transformer.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich import box
from rich.console import Console
from rich.table import Table

from batches import Batches
from digits import DigitsModel, digit_batches
from lightning_actmem import ActMem, ActMemEngine, StepReport
from text import TextModel, text_batches

SEED = 0
MIB = 2**20
FAST = {"limit_train_batches": 3, "log_every_n_steps": 1, "limit_val_batches": 1, "max_epochs": 1}


@dataclass(frozen=True)
class Task:
    """A model, its data, and how ActMem is switched on.

    Args:
        name: Name in the table and of the log directory.
        build: Returns the model and its training and validation batches.
        epochs: Epochs of training.
        actmem: How ActMem is switched on, in words.
        packed: Returns the Trainer's arguments that switch it on.
    """

    name: str
    build: Callable[[bool], tuple[LightningModule, Batches, Batches]]
    epochs: int
    actmem: str
    packed: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What one task has shown.

    Args:
        task: The task.
        report: What a packed training step stores.
        plain_loss: Validation loss after plain training.
        packed_loss: Validation loss after packed training.
        time_ratio: Time of a packed step divided by that of a plain one.
    """

    task: Task
    report: StepReport
    plain_loss: float
    packed_loss: float
    time_ratio: float


def build_transformer(fast: bool) -> tuple[LightningModule, Batches, Batches]:
    training, validation, characters = text_batches(batch_size=4 if fast else 16, seed=SEED)
    return TextModel(characters, depth=2 if fast else 4), training, validation


def build_digits(fast: bool) -> tuple[LightningModule, Batches, Batches]:
    return DigitsModel(width=16 if fast else 48), *digit_batches(batch_size=32 if fast else 128, seed=SEED)


TASKS = (
    Task("transformer", build_transformer, 1, 'strategy="actmem"', lambda: {"strategy": "actmem"}),
    Task("digits CNN", build_digits, 8, "ActMem(bits=4)", lambda: {"callbacks": [ActMem(bits=4)]}),
)


def train(task: Task, run: str, logdir: Path, fast: bool, **switch: Any) -> float:
    """Train from the same seed, with the same data in the same order, and return the final validation loss."""
    seed_everything(SEED, verbose=False)
    model, training, validation = task.build(fast)
    csv_logger = CSVLogger(logdir, name=f"{task.name.replace(' ', '_')}/{run}")
    trainer = Trainer(
        accelerator="cpu",  # the same table on every machine
        devices=1,
        logger=[csv_logger, TensorBoardLogger(logdir, name=csv_logger.name, version=csv_logger.version)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,  # and with it ActMem's table of layers
        num_sanity_val_steps=0,
        **{"max_epochs": task.epochs, "log_every_n_steps": 5, **(FAST if fast else {}), **switch},
    )
    trainer.fit(model, training, validation)
    return float(trainer.callback_metrics["val_loss"])


def time_steps(task: Task, fast: bool) -> tuple[float, StepReport]:
    """Take plain and packed steps in turn, outside Lightning: the ratio of their median times, and the bytes stored."""
    seed_everything(SEED, verbose=False)
    model, training, _ = task.build(fast)
    batch = next(iter(training))
    engine = ActMemEngine(bits=4)
    seconds: dict[str, list[float]] = {"plain": [], "packed": []}
    for _ in range(2 if fast else 12):
        start = time.perf_counter()
        model.loss(batch).backward()
        seconds["plain"].append(time.perf_counter() - start)

        start = time.perf_counter()
        with engine.compress(model, inputs=batch):
            loss = model.loss(batch)
        loss.backward()
        seconds["packed"].append(time.perf_counter() - start)
    return statistics.median(seconds["packed"]) / statistics.median(seconds["plain"]), engine.report()


def compare(task: Task, logdir: Path, fast: bool, console: Console) -> Result:
    """Train plain and packed, and say what is going on."""
    losses = {}
    for run, switch in (("plain", {}), ("packed", task.packed())):
        console.print(f"Training the {task.name}, {run} ...", end=" ")
        start = time.perf_counter()
        losses[run] = train(task, run, logdir, fast, **switch)
        console.print(f"{time.perf_counter() - start:.0f} s")
    time_ratio, report = time_steps(task, fast)
    return Result(task, report, losses["plain"], losses["packed"], time_ratio)


def table_of(results: list[Result]) -> Table:
    """Arrange the results."""
    table = Table(
        title="Plain training, and training with activations stored in 4 bits", box=box.SIMPLE_HEAD, show_edge=False
    )
    table.add_column("model, with\nActMem as", no_wrap=True)
    for column in ("plain\nMiB", "stored\nMiB", "ratio", "val loss\nplain", "val loss\npacked", "step\ntime"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        report = result.report
        figures = (
            f"{report.raw_bytes / MIB:.1f}",
            f"{report.saved_bytes / MIB:.1f}",
            f"{report.ratio:.1f}x",
            f"{result.plain_loss:.4f}",
            f"{result.packed_loss:.4f}",
            f"{result.time_ratio:.2f}x",
        )
        table.add_row(f"{result.task.name}\n{result.task.actmem}", *figures)
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train two small models, plain and with compressed activations.")
    parser.add_argument("--logdir", type=Path, default=Path("logs"), help="where the logs go (default: ./logs)")
    parser.add_argument("--fast", action="store_true", help="a few steps of smaller models, only to see it run")
    return parser.parse_args()


def quiet() -> None:
    """Keep Lightning's remarks on hardware and hints off the console; warnings that tell of a mistake stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "GPU available but not used")  # on purpose
    # Lightning walks its batches with a pytree type that torch deprecated in 2.9.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)


def main() -> None:
    """Run every task and print the table."""
    options = arguments()
    quiet()
    # One thread adds up in one order: the same table with any number of cores. And a busy machine does not stall it.
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    results = [compare(task, options.logdir, options.fast, console) for task in TASKS]
    console.print()
    console.print(table_of(results))
    console.print(
        "MiB are those kept for the backward pass of one step. What the loss saves and small\n"
        'tensors stay exact and count as stored; "packed part" leaves them out. "loss" is the\n'
        'validation loss, "step time" that of a packed step divided by that of a plain one.'
    )
    console.print(f"Logs: {options.logdir.resolve()} (metrics.csv in each run; tensorboard --logdir {options.logdir})")


if __name__ == "__main__":
    main()
