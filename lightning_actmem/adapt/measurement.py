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


@dataclass
class Measurement:
    """Plain numbers, at the scale of one sub-batch.

    Args:
        errors: For every site and codec measured, ``|g' - g|^2`` of each draw.
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
        self._errors: list[tuple[Target, Tensor]] = []
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
        self._errors += [((site, spec), value) for site, by_spec in found.items() for spec, value in by_spec.items()]

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
                self._errors.append(((site, spec), error))
                others = regrouped(replay.segments(site, spec), spec, choices[site])
                self._errors += [((site, other), error * growth) for other, growth in others.items()]
                self._passes += 1

    def result(self) -> Measurement:
        """Return the numbers: here alone the host waits for the device."""
        errors: dict[Target, list[float]] = {}
        values = torch.stack([error for _, error in self._errors]).tolist() if self._errors else []
        for (target, _), value in zip(self._errors, values, strict=True):
            errors.setdefault(target, []).append(value)
        return Measurement(
            errors,
            torch.stack(self._distances).tolist(),
            torch.stack(self._totals).tolist(),
            self._passes,
            self._probe_bytes,
        )


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
