"""What several processes have measured, brought together; none waits for another that has failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch import Trainer

from ..adapt.measurement import Measurement


class NotMeasuredError(Exception):
    """What was measured is not to be used, on any rank."""


class Join:
    """Brings the ranks' measurements together, each rank's exactly once, whether or not it has one.

    Args:
        trainer: The trainer.
        scale: Factor by which the losses have been multiplied.
    """

    def __init__(self, trainer: Trainer, scale: float) -> None:
        self._trainer = trainer
        self._scale = scale
        self._done = False

    def __call__(self, measurement: Measurement) -> Sequence[Measurement]:
        """Return the measurements of all ranks.

        Raises:
            NotMeasuredError: If a rank has none, or one that is not finite.
        """
        found = self._exchange(_unscaled(measurement, self._scale))
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            raise NotMeasuredError("another process could not measure")
        if not all(map(_is_finite, parts)):
            raise NotMeasuredError("a gradient is not finite")
        return parts

    def excuse(self) -> None:
        """Tell the others that there is no measurement, unless they have been told."""
        if not self._done:
            self._exchange(None)

    def _exchange(self, measurement: Measurement | None) -> list[Measurement | None]:
        self._done = True
        found = [measurement]
        if self._trainer.world_size > 1:
            found = [None] * self._trainer.world_size
            torch.distributed.all_gather_object(found, measurement)
        return found


def _unscaled(measurement: Measurement, scale: float) -> Measurement:
    """Return squares of gradients as they are without the loss scale, which changes between adaptations."""

    def divided(values: Sequence[float]) -> list[float]:
        return [value / scale**2 for value in values]

    return replace(
        measurement,
        errors={target: divided(errors) for target, errors in measurement.errors.items()},
        distances=divided(measurement.distances),
        totals=divided(measurement.totals),
    )


def _is_finite(measurement: Measurement) -> bool:
    errors = (error for errors in measurement.errors.values() for error in errors)
    return all(map(math.isfinite, (*errors, *measurement.distances, *measurement.totals)))
