"""What training steps with a batch size took, and the straight line through two such trials."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """What some training steps with a batch size took.

    Args:
        batch_size: Samples per step and device.
        peak_bytes: Largest number of bytes allocated at one time; 0 when memory ran out.
        resting_bytes: Bytes that stay between steps: weights, buffers, optimizer state; counted as the peak is.
        stored_bytes: Activation bytes stored for the backward pass, of those at the peak; ``None`` when unknown.
        out_of_memory: Whether memory ran out.
        samples: Samples that the steps really had, when the data did not give as many as asked for.
        moments: The peaks of the last step's moments, one after the other; empty where they were not told apart.
    """

    batch_size: int
    peak_bytes: int
    resting_bytes: int = 0
    stored_bytes: int | None = None
    out_of_memory: bool = False
    samples: int | None = None
    moments: tuple[int, ...] = ()


@dataclass(frozen=True)
class Line:
    """Peak memory as a function of the batch size: ``fixed_bytes + bytes_per_sample * batch_size``.

    Args:
        fixed_bytes: Weights, gradients, optimizer state, workspace.
        bytes_per_sample: Activations, stored and transient, and the batch itself.

    Example:
        >>> line = Line.through(Trial(8, 1800), Trial(16, 2600))
        >>> line.peak_bytes(32), line.largest(10_000)
        (4200, 90)
    """

    fixed_bytes: float
    bytes_per_sample: float

    @classmethod
    def through(cls, first: Trial, second: Trial) -> Line:
        """Return the line through two trials with different batch sizes."""
        slope = (second.peak_bytes - first.peak_bytes) / (second.batch_size - first.batch_size)
        return cls(first.peak_bytes - slope * first.batch_size, slope)

    @classmethod
    def safe(cls, trial: Trial) -> Line:
        """Return a line that lies above the peak of larger batches.

        The peak is the larger of what the optimizer's step takes, the same for every batch, and of what forward and
        backward take, ``a + c·B`` with ``a`` at least the resting bytes. Either way ``c <= (peak - resting) / B``.
        """
        return cls(trial.resting_bytes, (trial.peak_bytes - trial.resting_bytes) / trial.batch_size)

    def peak_bytes(self, batch_size: int) -> int:
        """Return the peak for a batch size."""
        return round(self.fixed_bytes + self.bytes_per_sample * batch_size)

    def largest(self, budget_bytes: int) -> int | None:
        """Return the largest batch size within a budget, perhaps 0; ``None`` when memory does not grow with it."""
        if self.bytes_per_sample <= 0:
            return None
        return max(0, int((budget_bytes - self.fixed_bytes) / self.bytes_per_sample))
