"""Prints what adapting costs in a run of the Trainer: time in training steps, and bytes beside a step's.

Run ``python -m benchmarks.adaptation --models gpt2 bert``, on the CPU. Time is the process's own, so that other load on
the machine does not count. The run is the first 280 steps of an epoch, which have all that is measured within 1,000:
the adaptation, the checks of its plan at the batches after it, and those 16, 64 and 256 batches later. "of 1,000 steps"
is the time of all of these. Bytes are the most that a step, and a part of a batch that is measured, store for backward.
Each line of the table appends a row to ``adaptation.csv``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, optim
from torch.utils.data import DataLoader, Dataset

from benchmarks.convergence import append
from benchmarks.models import MODELS, Workload, workload
from benchmarks.results import environment
from lightning_actmem import ActMem

EPOCH_STEPS = 1000


class Repeated(Dataset[Any]):
    """A workload's batch again and again, sample by sample."""

    def __init__(self, work: Workload, batches: int) -> None:
        self.work = work
        self.samples = len(work.inputs)
        self.batches = batches

    def __len__(self) -> int:
        return self.batches * self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.work.inputs[index % self.samples], self.work.targets[index % self.samples]


class Task(LightningModule):
    """A workload's model, trained by AdamW."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.model = work.model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.parameters(), 1e-4)


class Timed(ActMem):
    """Notes how long measuring and training take, in seconds of CPU time."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.adaptation_s: list[float] = []
        self.check_s: list[float] = []
        self.step_s: list[float] = []
        self.probe_bytes = 0
        self.step_bytes = 0
        self._started = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        start, measured = time.process_time(), len(self.adaptation.history)
        super().on_train_batch_start(*args)
        self._started = time.process_time()
        if len(self.adaptation.history) > measured:
            times = self.check_s if self.adaptation.history[-1].is_check else self.adaptation_s
            times.append(self._started - start)
            self.probe_bytes = max(self.probe_bytes, self.engine.adapter.probe_bytes)

    def on_train_batch_end(self, *args: Any) -> None:
        self.step_s.append(time.process_time() - self._started)
        self.step_bytes = max(self.step_bytes, self.engine.report(table=False).saved_bytes)
        super().on_train_batch_end(*args)


def measure(name: str, batch: int, batches: int) -> Timed:
    """Train for some batches and adapt once."""
    seed_everything(0, verbose=False)
    work = workload(name, batch)
    actmem = Timed(noise=0.05, summary=False)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=actmem,
    )
    trainer.fit(Task(work), DataLoader(Repeated(work, batches), batch_size=batch))
    return actmem


def row(name: str, batch: int, found: Timed) -> dict[str, str | int]:
    """Return the figures of a model: times in steps, of a step and a check the medians."""
    step_s, adaptation_s = statistics.median(found.step_s), sum(found.adaptation_s)
    check_s = statistics.median(found.check_s) if found.check_s else 0.0
    share = (adaptation_s + sum(found.check_s)) / (EPOCH_STEPS * step_s)
    return {
        "model": name,
        "batch": batch,
        "step_ms": f"{1000 * step_s:.0f}",
        "adaptation_steps": f"{adaptation_s / step_s:.1f}",
        "check_steps": f"{check_s / step_s:.1f}",
        "checks": len(found.check_s),
        "percent_of_1000_steps": f"{100 * share:.2f}",
        "stored_bytes": found.step_bytes,
        "probe_bytes": found.probe_bytes,
    }


def main() -> None:
    """Print the table and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt2"], choices=[*MODELS])
    parser.add_argument("--batch", type=int, default=16, help="samples in a batch")
    parser.add_argument("--batches", type=int, default=280)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("adaptation.csv"))
    arguments = parser.parse_args()
    print("| model | batch | step ms | adaptation, steps | a check | checks | % of 1,000 steps | stored | of a probe |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.models:
        found = row(name, arguments.batch, measure(name, arguments.batch, arguments.batches))
        append(arguments.csv, {**environment(torch.device("cpu")), **found})
        print(f"| {' | '.join(map(str, found.values()))} |", flush=True)


if __name__ == "__main__":
    main()
