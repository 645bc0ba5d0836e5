"""The peak of a step: each of its moments is a straight line over the batch size, and the highest one counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .trial import Line, Trial


@dataclass(frozen=True)
class Envelope:
    """Peak memory as a function of the batch size: ``max over moments of fixed_bytes + bytes_per_sample * batch_size``.

    Args:
        lines: Those that are the highest for some batch size, from the flattest to the steepest.

    Example:
        >>> envelope = Envelope.above([Line(1000, 1), Line(100, 10), Line(200, 5)])
        >>> envelope.peak_bytes(10), envelope.peak_bytes(200), len(envelope.lines)
        (1010, 2100, 2)
    """

    lines: tuple[Line, ...]

    @classmethod
    def through(cls, first: Trial, second: Trial) -> Envelope:
        """Return the peak through two trials with different batch sizes, the smaller first.

        Where both have the same moments each has a line of its own: another moment than in small batches may be the
        peak of a large one. Otherwise it is one straight line.
        """
        lines = [Line.through(first, second)]
        if first.moments and len(first.moments) == len(second.moments):
            sizes = first.batch_size, second.batch_size
            lines = [
                Line.through(Trial(sizes[0], low), Trial(sizes[1], high))
                for low, high in zip(first.moments, second.moments, strict=True)
            ]
        return cls.above(lines)

    @classmethod
    def above(cls, lines: Iterable[Line]) -> Envelope:
        """Return the upper envelope of lines, for batches of one sample and more."""
        upper: list[Line] = []
        for line in sorted(lines, key=lambda line: (line.bytes_per_sample, line.fixed_bytes)):
            while upper and _from(upper, line) <= _begin(upper):
                upper.pop()
            upper.append(line)
        return cls(tuple(upper))

    def at(self, batch_size: int) -> Line:
        """Return the line of the moment that is the peak of a batch size."""
        return max(self.lines, key=lambda line: line.peak_bytes(batch_size))

    def peak_bytes(self, batch_size: int) -> int:
        """Return the peak for a batch size."""
        return self.at(batch_size).peak_bytes(batch_size)

    def largest(self, budget_bytes: int) -> int | None:
        """Return the largest batch size within a budget, perhaps 0; ``None`` when memory does not grow with it."""
        ends = [line.largest(budget_bytes) for line in self.lines]
        return min((end for end in ends if end is not None), default=None)


def _from(upper: Sequence[Line], line: Line) -> float:
    """Return the batch size from which on a line is above the last of the upper ones, which is flatter."""
    last = upper[-1]
    steeper = line.bytes_per_sample - last.bytes_per_sample
    return (last.fixed_bytes - line.fixed_bytes) / steeper if steeper else 0.0


def _begin(upper: Sequence[Line]) -> float:
    """Return the batch size from which on the last of the upper lines is the highest."""
    return max(1.0, _from(upper[:-1], upper[-1])) if len(upper) > 1 else 1.0
