"""Pictures of the bits for loggers that take them: a histogram, and a heat map of layers over adaptations."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import Trainer

from .history import Record

_INCHES_PER_LAYER = 0.18
_MAX_LABELS = 12


def log_figures(trainer: Trainer, history: Sequence[Record]) -> None:
    """Give every logger that takes them a histogram of the layers' bits and, with matplotlib, the heat map.

    A logger takes them if its ``experiment`` has ``add_histogram`` or ``add_figure``, as TensorBoard's writer has.

    Args:
        trainer: The trainer; its loggers write on rank zero only.
        history: The adaptations so far, the last one new.
    """
    if not trainer.is_global_zero:
        return
    record = history[-1]
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_histogram"):
            experiment.add_histogram("actmem/bits", torch.tensor(list(record.bits.values())), record.step)
        if hasattr(experiment, "add_figure") and find_spec("matplotlib") is not None:
            experiment.add_figure("actmem/bits_over_time", heat_map(history), record.step)


def heat_map(history: Sequence[Record]) -> Any:
    """Draw the bits per element of every layer after every adaptation.

    Args:
        history: The adaptations, at least one.

    Returns:
        A ``matplotlib.figure.Figure``, known to no global state of matplotlib. Layers lie in the order of the forward
        pass.
    """
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(layer for record in history for layer in record.bits))
    values = [[record.bits.get(layer, float("nan")) for record in history] for layer in layers]
    figure = Figure(figsize=(8, 2 + _INCHES_PER_LAYER * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(layers)), layers)
    labelled = range(0, len(history), 1 + len(history) // _MAX_LABELS)
    axes.set_xticks(labelled, [str(history[column].step) for column in labelled])
    axes.set_xlabel("step of the adaptation")
    figure.colorbar(image, label="stored bits per element")
    return figure
