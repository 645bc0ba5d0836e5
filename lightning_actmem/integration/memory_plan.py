"""What `plan` returns: as data, as text, as JSON and as a figure."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ActMemError
from ..memory import human_bytes

_MAX_ROWS = 20
_STEPS = 100  # of a curve in the figure


@dataclass(frozen=True)
class MethodPlan:
    """One way to train.

    Args:
        name: ``"plain"``, ``"4 bits"``, ``"noise=0.05"``, ``"checkpoint"``.
        fixed_bytes: Peak memory of no sample, as batches near the plan's have it: weights, gradients, optimizer state,
            workspace.
        bytes_per_sample: Peak memory that each sample adds there.
        stored_bytes: Largest number of activation bytes stored at one time, where the engine counts them.
        raw_bytes: The same for plain autograd.
        peak_bytes: Predicted peak for the plan's batch size.
        largest_batch: Largest batch size within the budget, where there is one and memory grows with the batch.
        lines: Fixed bytes and bytes per sample of each moment of a step that is the peak of some batch size, from the
            flattest to the steepest: the highest of them is the peak.
    """

    name: str
    fixed_bytes: int
    bytes_per_sample: float
    stored_bytes: int | None
    raw_bytes: int | None
    peak_bytes: int
    largest_batch: int | None
    lines: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer stores over a step.

    Args:
        layer: Its path (``""`` for code outside every submodule).
        kind: ``"packed"``, or why it stays exact.
        raw_bytes: Bytes that plain autograd keeps.
        saved_bytes: Bytes stored, by method.
    """

    layer: str
    kind: str
    raw_bytes: int
    saved_bytes: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """A prediction for one model.

    Args:
        batch_size: The batch size it is for.
        budget_bytes: Memory to fill, if given.
        trace: The batch sizes it was made from.
        methods: The ways to train, plain first.
        layers: Stored bytes by layer, in the order of the forward pass.
        notes: What one has to know of some of them: what was checkpointed, which noise was measured.
        unpredicted: Why there are no figures for a way to train, by its name: no bits could be chosen, or its blocks
            cannot be checkpointed.
    """

    batch_size: int
    budget_bytes: int | None
    trace: tuple[int, int]
    methods: tuple[MethodPlan, ...]
    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...] = ()
    unpredicted: dict[str, str] = field(default_factory=dict)

    def method(self, name: str) -> MethodPlan:
        """Return the row of that name."""
        return next(method for method in self.methods if method.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in plain Python types, for JSON."""
        return dataclasses.asdict(self)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def save_figure(self, path: str | os.PathLike[str]) -> None:
        """Draw peak memory over the batch size, one line for each method; the format follows the file's ending.

        Raises:
            ActMemError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ActMemError(
                "a figure needs matplotlib, and it is not installed. Run `pip install matplotlib`, or write JSON."
            ) from None
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        largest = max([2 * self.batch_size, *(method.largest_batch or 0 for method in self.methods)])
        sizes = [largest * step / _STEPS for step in range(_STEPS + 1)]
        for method in self.methods:
            peaks = [max(fixed + each * size for fixed, each in method.lines) / 2**30 for size in sizes]
            axes.plot(sizes, peaks, label=method.name)
        for name in self.unpredicted:
            axes.plot([], [], " ", label=f"{name}: not predicted")
        if self.budget_bytes is not None:
            axes.axhline(self.budget_bytes / 2**30, color="black", linestyle="--", label="budget")
            axes.set_ylim(0, 1.2 * self.budget_bytes / 2**30)
        axes.set(xlabel="batch size", ylabel="peak memory (GiB)")
        axes.legend()
        figure.savefig(path)

    def render(self) -> str:
        """Return the plan as text: the ways to train, then the layers that store most."""
        title = (
            f"Predicted for batch size {self.batch_size} from steps with {self.trace[0]} and {self.trace[1]} samples"
        )
        budget = [] if self.budget_bytes is None else [f"largest batch in {human_bytes(self.budget_bytes)}"]
        header = ["method", "fixed", "per sample", "stored", "peak", *budget]
        rows = [
            [
                method.name,
                human_bytes(method.fixed_bytes),
                human_bytes(round(method.bytes_per_sample)),
                "-" if method.stored_bytes is None else human_bytes(method.stored_bytes),
                human_bytes(method.peak_bytes),
                *(["-" if method.largest_batch is None else str(method.largest_batch)] if budget else []),
            ]
            for method in self.methods
        ]
        rows += [[name, *("-" for _ in header[1:])] for name in self.unpredicted]
        reasons = (f"{name}: not predicted, because {reason}" for name, reason in self.unpredicted.items())
        notes = [f"{note}." for note in (*self.notes, *reasons)]
        return "\n".join([title, "", *_table(header, rows, 1), *notes, "", *self._layer_table()])

    def _layer_table(self) -> Iterator[str]:
        names = list(dict.fromkeys(name for layer in self.layers for name in layer.saved_bytes))
        ordered = sorted(self.layers, key=lambda layer: -layer.raw_bytes)
        rows = [
            [
                layer.layer or "(outside submodules)",
                layer.kind,
                human_bytes(layer.raw_bytes),
                *(human_bytes(layer.saved_bytes.get(name, 0)) for name in names),
            ]
            for layer in ordered[:_MAX_ROWS]
            if layer.raw_bytes or any(layer.saved_bytes.values())
        ]
        yield from _table(["layer", "kind", "plain", *names], rows, 2)
        if len(ordered) > _MAX_ROWS:
            yield f"... {len(ordered) - _MAX_ROWS} more rows; JSON has all of them"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left_aligned: int) -> Iterator[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if column < left_aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
        if row is header:
            yield "-" * (sum(widths) + 2 * (len(widths) - 1))
