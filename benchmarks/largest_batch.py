"""Measures the largest batch at a fixed budget: plain, checkpointing, offloading, and ActMem at several settings.

Run ``python -m benchmarks.largest_batch``; ``--help`` lists the options and README.md explains the columns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_actmem.memory import held_bytes, tensor_bytes
from lightning_actmem.units import parse_bytes

from .convergence import append
from .measure import peak_bytes
from .methods import ActMem, Checkpoint, Method, SaveOnCpu
from .models import MODELS, Workload, workload
from .results import environment

CSV = Path(__file__).with_name("largest_batch.csv")
NAMES = ("mlp", "gpt2", "bert", "resnet50")
NOISE = 0.05
ADAPTATIONS = 4
PARTS = 2
TOLERANCE = 0.005  # of the batch, where one sample is less than that
MAX_GROWTH = 4
MIB = 2**20


class Largest(NamedTuple):
    """The largest batch that stays within a budget, and the next one that was tried, which does not."""

    batch: int
    peak_bytes: int
    next_batch: int
    next_peak_bytes: int


class Adapted(ActMem):
    """This library with the bits that a noise allows, chosen on a small batch before."""

    def __init__(self, noise: float, **fields: Any) -> None:
        super().__init__(4, noise=noise, **fields)
        self.name = f"actmem noise={noise:g}"
        self.bits = None

    def choose_bits(self, work: Workload) -> None:
        """Measure on the two halves of a batch, and allocate, until nothing is left to measure."""
        adapter = self.engine.adapter
        assert adapter is not None
        self.step(work)  # tells the sizes
        halves = [
            Workload(work.model, work.blocks, inputs, targets, work.autocast)
            for inputs, targets in zip(work.inputs.chunk(PARTS), work.targets.chunk(PARTS), strict=True)
        ]
        for _ in range(ADAPTATIONS):
            adapter.measure(work.model, [half.loss for half in halves], inputs=[half.inputs for half in halves])
            adapter.allocate()

    def note(self, work: Workload) -> str:
        return f"{self.engine.report().bits_per_element:.2f} bits per element of an activation"


def methods(bits: Sequence[int] = (4, 2), noise: float = NOISE) -> list[Method]:
    """Return what is compared, plain first."""
    return [Method(), Checkpoint(), SaveOnCpu(), *(ActMem(each) for each in bits), Adapted(noise)]


def training_bytes(name: str, batch: int, method: Method, device: str = "cpu") -> int:
    """Return the peak of a training step with a batch: weights, gradients, the batch, and what the step takes."""
    work = on_model(name, batch, method, device)
    held = held_bytes(work.model) + tensor_bytes([work.inputs, work.targets])
    gradients = tensor_bytes(parameter.grad for parameter in work.model.parameters())
    return held + gradients + peak_bytes(work, method)


def on_model(name: str, batch: int, method: Method, device: str) -> Workload:
    """Return a workload with its gradients there, and what the method makes once made."""
    work = workload(name, batch, device)
    method.step(work)
    return work


def largest(peak_of: Callable[[int], int], budget_bytes: int, start: int) -> Largest:
    """Find the largest batch within a budget by interpolation: memory grows with the batch, nearly straight.

    Args:
        peak_of: Measures a batch size.
        budget_bytes: The budget.
        start: The first batch size.

    Returns:
        What was found.

    Raises:
        ValueError: If not even one sample stays within the budget.
    """
    fits: dict[int, int] = {}
    fails: dict[int, int] = {}
    batch = start
    while True:
        peak = peak_of(batch)
        (fits if peak <= budget_bytes else fails)[batch] = peak
        if not fits:
            if batch == 1:
                raise ValueError(f"the budget must allow one sample, which takes {peak}, got {budget_bytes} bytes.")
            batch = max(1, batch // 2)
            continue
        best = max(fits)
        if fails and min(fails) - best <= max(1, TOLERANCE * best):
            return Largest(best, fits[best], min(fails), fails[min(fails)])
        batch = _next(fits, fails, budget_bytes)


def _next(fits: dict[int, int], fails: dict[int, int], budget_bytes: int) -> int:
    best = max(fits)
    others = [batch for batch in (*fits, *fails) if batch != best]
    if not others:
        return 2 * best
    other = min(fails) if fails else max(others)
    slope = ((fails | fits)[other] - fits[best]) / (other - best)
    aim = best + (budget_bytes - fits[best]) / slope if slope > 0 else MAX_GROWTH * best
    if not fails:
        return max(best + 1, min(int(aim * (1 + TOLERANCE)), MAX_GROWTH * best))
    # A step beyond where the line meets the budget, from either side: both ends close in.
    step_size = max(1, int(TOLERANCE * best / 2))
    nearer = int(aim) + step_size if int(aim) <= best else int(aim)
    return max(best + 1, min(nearer, other - 1))


def measure(
    name: str,
    budget_bytes: int | None = None,
    start: int | None = None,
    device: str = "cpu",
    compared: Sequence[Method] | None = None,
) -> list[dict[str, Any]]:
    """Find the largest batch of every method on one model.

    Args:
        name: The model: one of `MODELS`.
        budget_bytes: The budget; ``None``: what plain training takes with ``start``.
        start: First batch size of every search; ``None``: the model's own.
        device: ``"cpu"`` or ``"cuda"``.
        compared: The methods, plain first.

    Returns:
        A row per method.
    """
    start = MODELS[name].batch if start is None else start
    compared = methods() if compared is None else compared
    budget = training_bytes(name, start, compared[0], device) if budget_bytes is None else budget_bytes
    rows: list[dict[str, Any]] = []
    plain: Largest | None = None
    for method in compared:
        if isinstance(method, Adapted):
            method.choose_bits(workload(name, start, device))
        has_no_effect = isinstance(method, SaveOnCpu) and device == "cpu"
        if has_no_effect and plain is not None:
            found, note = plain, "no effect on a CPU: same as plain"
        else:
            found = largest(lambda batch, by=method: training_bytes(name, batch, by, device), budget, start)
            note = method.note(workload(name, start, device))
        plain = plain or found
        rows.append(
            {
                **environment(torch.device(device)),
                "model": name,
                "method": method.name if method.bits is None else f"{method.name} {method.bits} bits",
                "budget_bytes": budget,
                **found._asdict(),
                "gain": round(found.batch / plain.batch, 3),
                "note": note,
            }
        )
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown, without a heading."""
    lines = []
    for row in rows:
        cells = [
            row["model"],
            f"{row['budget_bytes'] / MIB:.1f}",
            row["method"],
            str(row["batch"]),
            f"{row['gain']:.2f}x",
            f"{row['peak_bytes'] / MIB:.1f}",
            row["note"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest_batch", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(NAMES), help=f"default: {NAMES}")
    parser.add_argument("--budget", type=parse_bytes, help="for example 80GiB; default: plain's with the model's batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--csv", type=Path, default=CSV, help="the rows are appended here; default: beside the program")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the models one after the other, and append each one's rows as soon as they are there."""
    options = arguments(argv)
    torch.set_num_threads(1)
    print("| model | budget, MiB | method | largest batch | gain | peak, MiB | note |")
    print("|---|---|---|---|---|---|---|")
    for name in options.model:
        rows = measure(name, options.budget, device=options.device)
        for row in rows:
            append(options.csv, row)
        print(table_of(rows), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler reports each start and stop on the console
    main()
