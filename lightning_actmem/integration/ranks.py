"""What several processes have measured, brought together; none waits for another that has failed."""

from __future__ import annotations

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
        factor: What the rank's own is multiplied by, so that it compares with other ranks' and adaptations'.
    """

    def __init__(self, trainer: Trainer, factor: float) -> None:
        self._trainer = trainer
        self._factor = factor
        self._done = False

    def __call__(self, measurement: Measurement) -> Sequence[Measurement]:
        """Return the measurements of all ranks.

        Raises:
            NotMeasuredError: If a rank has none, or one that is not finite.
        """
        found = self._exchange(_times(measurement, self._factor))
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            raise NotMeasuredError("another process could not measure")
        if not all(part.is_finite for part in parts):
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


def _times(measurement: Measurement, factor: float) -> Measurement:
    """Return a measurement in another unit."""
    return replace(
        measurement,
        errors={target: [error * factor for error in errors] for target, errors in measurement.errors.items()},
        distances=[distance * factor for distance in measurement.distances],
        totals=[total * factor for total in measurement.totals],
    )
