"""The figures of steps and adaptations as torchmetrics metrics: means, with ``.plot()``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ..report import StepReport
from .history import Record


class _Mean(Metric):
    """The mean over all that it was updated with; over all processes after a synchronisation."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # float64: float32 has no exact byte counts from 16 MiB on.
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw one value or several; needs matplotlib.

        Args:
            val: What ``compute`` or ``forward`` has returned, once or in a list; ``None``: the present mean.
            ax: The axes to draw on, or ``None`` for a new figure.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)

    def _add(self, figure: float) -> None:
        self.total += figure
        self.count += 1


class CompressionRatio(_Mean):
    """Mean over training steps of the bytes that plain autograd would have kept by the bytes stored.

    Args:
        **kwargs: Those of every `torchmetrics.Metric`.

    Example:
        >>> from lightning_actmem import ActMemEngine
        >>> engine, metric = ActMemEngine(bits=4), CompressionRatio()
        >>> layer, x = torch.nn.Linear(64, 64), torch.randn(512, 64, requires_grad=True)
        >>> with engine.compress(layer):
        ...     loss = layer(x * 1).sum()
        >>> metric.update(engine.report())
        >>> bool(metric.compute() > 7)
        True
    """

    higher_is_better = True

    def update(self, report: StepReport) -> None:
        """Take a step's report (``engine.report()``)."""
        self._add(report.ratio)


class StoredBytes(_Mean):
    """Mean over training steps of the most activation bytes stored at one time.

    Args:
        **kwargs: Those of every `torchmetrics.Metric`.
    """

    higher_is_better = False

    def update(self, report: StepReport) -> None:
        """Take a step's report (``engine.report()``)."""
        self._add(report.saved_bytes)


class BitsPerElement(_Mean):
    """Mean over training steps of the stored bits per element of an activation.

    Args:
        **kwargs: Those of every `torchmetrics.Metric`.
    """

    higher_is_better = False

    def update(self, report: StepReport) -> None:
        """Take a step's report (``engine.report()``)."""
        self._add(report.bits_per_element)


class GradientNoise(_Mean):
    """Mean over adaptations of the variance that rounding added, relative to the minibatch gradient's own.

    Args:
        **kwargs: Those of every `torchmetrics.Metric`.
    """

    higher_is_better = False

    def update(self, record: Record) -> None:
        """Take an adaptation (of ``actmem.adaptation.history``)."""
        self._add(record.noise)
