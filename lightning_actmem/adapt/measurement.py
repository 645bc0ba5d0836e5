"""What one adaptation measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec

from ..saved.site import Site
from .groups import regrouped
from .law import Choices
from .replay import ExactGradient, Replay
from .schedule import Target

# How far apart sub-batches may be taken to be: beyond that a single site has most of the plan's error.
_MOST = 2.0


@dataclass
class Measurement:
    """Plain numbers, at the scale of one sub-batch.

    Args:
        errors: For every site and codec measured, ``|g' - g|^2`` of each draw, at the scale of the mean sub-batch.
        distances: ``|g1 - g2|^2 / 2`` of consecutive sub-batches: the gradient's own variance.
        totals: ``|g' - g|^2`` with every site rounded by the plan.
        passes: Backward passes that were run.
        probe_bytes: The most bytes that a probe has held for its backward passes.
    """

    errors: dict[Target, list[float]] = field(default_factory=dict)
    distances: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    passes: int = 0
    probe_bytes: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether every number is one."""
        errors = [error for draws in self.errors.values() for error in draws]
        return all(map(math.isfinite, [*errors, *self.distances, *self.totals]))


class Measuring:
    """Runs the passes of one adaptation; nothing is read from the device before `result`.

    Args:
        parameters: The parameters that require gradients.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._exact = ExactGradient(parameters)
        self._distances: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._errors: list[tuple[Target, Tensor, int]] = []
        self._passes = 0
        self._probe_bytes = 0

    def begin(self, replay: Replay, plan: Mapping[Site, CodecSpec]) -> None:
        """Measure the exact gradient of a sub-batch, and the whole plan at once.

        Args:
            replay: The sub-batch.
            plan: The present codec of every site that is rounded.
        """
        is_first = self._passes == 0
        _, distance = self._exact.take(replay)
        if not is_first:
            self._distances.append(distance / 2)
        self._totals.append(self._exact.error(replay, plan))
        self._passes += 2
        self._probe_bytes = max(self._probe_bytes, replay.stored_bytes)

    def add(self, found: Mapping[Site, Mapping[CodecSpec, Tensor]]) -> None:
        """Take what is known without replay."""
        for site, by_spec in found.items():
            self._note({(site, spec): value for spec, value in by_spec.items()})

    def replay(self, replay: Replay, targets: Sequence[Target], choices: Choices) -> None:
        """Measure one target after the other on the sub-batch that was begun last, whose graph still lives.

        Args:
            replay: The sub-batch.
            targets: What is measured.
            choices: The codecs of every site; those that follow from a measured one are noted too.
        """
        for site, spec in targets:
            if site in replay.uses:
                error = self._exact.error(replay, {site: spec})
                others = regrouped(replay.segments(site, spec), spec, choices[site])
                self._note({(site, spec): error, **{(site, other): error * by for other, by in others.items()}})
                self._passes += 1

    def result(self) -> Measurement:
        """Return the numbers: here alone the host waits for the device.

        Rounding does more to one sub-batch than to another, at most sites alike, and each site is measured on one of
        them. So its error counts in proportion to what the whole plan does there (a ratio estimate: Cochran, "Sampling
        techniques", 1977, chapter 6), and scatters less.
        """
        errors: dict[Target, list[float]] = {}
        totals = torch.stack(self._totals)
        scales = torch.where(totals > 0, totals.mean() / totals, 1.0).clamp(1 / _MOST, _MOST)
        values = torch.stack([error * scales[part] for _, error, part in self._errors]).tolist() if self._errors else []
        for (target, _, _), value in zip(self._errors, values, strict=True):
            errors.setdefault(target, []).append(value)
        return Measurement(
            errors,
            torch.stack(self._distances).tolist(),
            totals.tolist(),
            self._passes,
            self._probe_bytes,
        )

    def _note(self, errors: Mapping[Target, Tensor]) -> None:
        """Note errors on the sub-batch that was begun last."""
        self._errors += [(target, error, len(self._totals) - 1) for target, error in errors.items()]


def merged(parts: Sequence[Measurement]) -> Measurement:
    """Join what several ranks have measured, each on its own data."""
    whole = Measurement()
    for part in parts:
        for target, errors in part.errors.items():
            whole.errors.setdefault(target, []).extend(errors)
        whole.distances += part.distances
        whole.totals += part.totals
        whole.passes = max(whole.passes, part.passes)
        whole.probe_bytes = max(whole.probe_bytes, part.probe_bytes)
    return whole
