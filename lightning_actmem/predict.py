"""The largest batch for a budget, from a few measured ones: memory is nearly a straight line over the batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, sqrt

from .envelope import Envelope
from .memory import human_bytes
from .trial import Line, Trial

#: A secant that goes further than the safe estimate by more than this is not trusted: memory may have a kink behind it.
_TRUSTED = 1.03
#: The same where the smaller batch took so much more than what rests that it was not the optimizer's step.
_TRUSTED_MORE, _OPTIMIZERS_SHARE = 1.1, 4
_SAFE_SHARE = 0.8
_FLAT_STEP = 8
_BACK_OFF = 0.94
_STRAIGHT = 0.05  # the share by which the slopes of two secants of a straight line may differ
_FLAT = 0.8  # and by which they differ at least where the first one was flat
# Memory is not quite a straight line, and a near miss costs a trial.
_LEAST_DOUBT, _MOST_DOUBT = 0.02, 0.045


@dataclass
class BatchSearch:
    """Finds the largest batch size within a budget in a few trials, each of which decides the next.

    A small batch; then most of what it lets expect on the safe side; then the prediction, on the safe side again where
    the two do not agree with a straight line; then, where it is worth it, one more on the line through the largest two,
    short of the budget by what the bend so far puts in doubt. Where trials tell the moments of a step apart, each has a
    line of its own, and the optimizer's step may be the peak of the first batches without hiding what is to come. Only
    batches whose own trial has succeeded are returned; one that ran before memory ran out is run once more, or, where
    that was the last trial, stands.

    Args:
        budget_bytes: What may be allocated at one time.
        start: Batch size of the first trial.
        limit: Largest batch size that makes sense (the number of samples), or ``None``.
        max_trials: Trials at most; more only as long as none has fitted.
        tolerance: The search ends when no more than this share of the batch is to be gained.
        spread_bytes: By how much a batch that ran may have exceeded the budget that the prediction keeps to: what the
            system tells of a process's memory scatters.
    """

    budget_bytes: int
    start: int = 8
    limit: int | None = None
    max_trials: int = 4
    tolerance: float = 0.02
    spread_bytes: int = 0
    trials: list[Trial] = field(default_factory=list)

    @property
    def fitting(self) -> list[Trial]:
        """The trials that stayed within the budget and below where memory ran out, the smallest batch first."""
        exhausted = self._exhausted()
        end = exhausted[0] if exhausted else inf
        fit = {
            trial.batch_size: trial  # the last one of each size
            for trial in self.trials
            if trial.batch_size < end and trial.peak_bytes <= self.budget_bytes + self.spread_bytes
        }
        return [fit[batch_size] for batch_size in sorted(fit)]

    @property
    def failed(self) -> int | None:
        """The smallest batch size that did not fit."""
        fit = self.fitting
        return min((trial.batch_size for trial in self.trials if trial not in fit), default=None)

    @property
    def best(self) -> int | None:
        """The largest batch size that is known to fit."""
        return self.fitting[-1].batch_size if self.fitting else None

    @property
    def grows(self) -> bool:
        """Whether memory grows with the batch, as far as one can tell."""
        fit = self.fitting
        # Not than with the smallest batch, which comes first and may pay for what is made once.
        least = min((trial.peak_bytes for trial in fit), default=0)
        return len(fit) < 2 or fit[-1].peak_bytes > least or self.failed is not None

    @property
    def line(self) -> Line | None:
        """The line through the two largest batches that were measured; of the moment that reaches the budget first."""
        largest = self._largest_two
        if largest is None:
            return None

        def end(line: Line) -> float:
            batch_size = line.largest(self.budget_bytes)
            return inf if batch_size is None else batch_size

        return min(Envelope.through(*largest).lines, key=end)

    @property
    def _largest_two(self) -> tuple[Trial, Trial] | None:
        """The two largest batches that were measured, the smaller one first."""
        measured = {trial.batch_size: trial for trial in self.trials if not trial.out_of_memory}
        if len(measured) < 2:
            return None
        smaller, larger = sorted(measured)[-2:]
        return measured[smaller], measured[larger]

    @property
    def _tells_moments(self) -> bool:
        """Whether that line is one moment's: another one, such as the optimizer's step, may be the peak so far."""
        largest = self._largest_two
        return largest is not None and 0 < len(largest[0].moments) == len(largest[1].moments)

    def run(self, measure: Callable[[int], Trial]) -> int | None:
        """Measure batch sizes until the largest one is found.

        Args:
            measure: Runs training steps with a batch size.

        Returns:
            The largest batch size that has been seen to fit, or ``None`` if not even one sample fits.
        """
        batch_size = self._within(self.start)
        while True:
            trial = measure(batch_size)
            if trial.samples is not None:
                self.limit = trial.samples
                trial = replace(trial, batch_size=trial.samples)
            self.trials.append(trial)
            best, following = self.best, self.next()
            if following is None:
                if best is None or self._is_spent or self._is_certain(best):
                    return best
                following = best
            batch_size = following

    @property
    def _is_spent(self) -> bool:
        """Whether there have been as many trials as there may be."""
        return len(self.trials) >= self.max_trials

    def _is_certain(self, batch_size: int) -> bool:
        """Whether memory has not run out since a batch size ran: a step that fails may leave something behind."""
        last = max(index for index, trial in enumerate(self.trials) if trial.batch_size == batch_size)
        return not any(trial.out_of_memory for trial in self.trials[last:])

    def next(self) -> int | None:
        """Return the next batch size to try, or ``None`` when the search is over."""
        fit = self.fitting
        if not fit:
            smallest = min(trial.batch_size for trial in self.trials)
            return smallest // 4 or 1 if smallest > 1 else None
        if self._is_spent:
            return None
        best = fit[-1].batch_size
        candidate = self._within(self._candidate(fit))
        if self.failed is not None:
            candidate = min(candidate, self.failed - 1)
        exhausted = self._exhausted()
        if exhausted:
            candidate = min(candidate, max(best, int(_BACK_OFF * exhausted[0])))
        worth_it = candidate > best * (1 + self.tolerance) or (len(fit) == 1 and candidate > best)
        return candidate if worth_it else None

    def _candidate(self, fit: list[Trial]) -> int:
        last = fit[-1]
        exhausted = self._exhausted()
        if len(exhausted) > 1:
            # Far from what the budget says, and with few trials, orders of magnitude are to be halved.
            return int(sqrt(last.batch_size * exhausted[0]))
        # What rests after larger batches may be theirs: workspaces that a library keeps.
        resting = min(trial.resting_bytes for trial in fit)
        safe = Line.safe(replace(last, resting_bytes=resting)).largest(self.budget_bytes)
        if len(fit) == 1 and self.failed is not None:
            between = (last.batch_size + self.failed) // 2
            # The line ends above the budget where the batch that failed was measured, and else there is none.
            return between if self.line is None else self.line.largest(self._aim(fit)) or between
        if len(fit) == 1:
            expected = last.batch_size if safe is None else safe
            return max(2 * last.batch_size, int(_SAFE_SHARE * expected))
        budget = self._aim(fit)
        secant = self.line.largest(budget) if self.line else None
        if secant is None:  # flat: the optimizer's step takes more than these batches
            return min(_FLAT_STEP * last.batch_size, safe) if safe else _FLAT_STEP * last.batch_size
        # Behind a kink the secant of two batches says nothing; a third one on it says that there was none.
        if safe is None or secant <= _TRUSTED * safe or (len(fit) > 2 and self._bend(fit) < _STRAIGHT):
            return secant
        if self._tells_moments:
            near = max(int(_SAFE_SHARE * secant), min(secant, int(_TRUSTED_MORE * safe)))
            return near if len(fit) == 2 and self.failed is None else secant
        if len(fit) > 2 and self._bend(fit) > _FLAT:
            return safe  # flat before: the optimizer's step, so that the last two lie on both sides of a kink
        is_slope = len(fit) > 2 or fit[0].peak_bytes > _OPTIMIZERS_SHARE * fit[0].resting_bytes
        return min(secant, int(_TRUSTED_MORE * safe)) if is_slope else safe

    def _aim(self, fit: list[Trial]) -> int:
        """Return a little less than the budget."""
        line, last = self.line, fit[-1]
        if line is None or line.bytes_per_sample <= 0:
            return self.budget_bytes
        doubt = _LEAST_DOUBT
        if len(fit) > 2:
            # Twice what the bend would add, if it went on to the budget: it may turn.
            doubt = min(max(doubt, 2 * self._bend(fit) * (1 - last.peak_bytes / self.budget_bytes)), _MOST_DOUBT)
        return int(line.fixed_bytes + (1 - doubt) * (self.budget_bytes - line.fixed_bytes))

    @staticmethod
    def _bend(fit: list[Trial]) -> float:
        """Return by what share of the slope the last two secants differ."""
        before, last = Line.through(*fit[-3:-1]), Line.through(*fit[-2:])
        return abs(last.bytes_per_sample - before.bytes_per_sample) / max(last.bytes_per_sample, 1)

    def _exhausted(self) -> list[int]:
        """The batch sizes with which memory has run out, the smallest one first."""
        return sorted(trial.batch_size for trial in self.trials if trial.out_of_memory)

    def _within(self, batch_size: int) -> int:
        return max(1, min(batch_size, self.limit) if self.limit is not None else batch_size)

    def explain(self) -> str:
        """Say what was tried and what follows from it, in one line."""
        tried = ", ".join(
            f"{trial.batch_size}: {'out of memory' if trial.out_of_memory else human_bytes(trial.peak_bytes)}"
            for trial in self.trials
        )
        line = self.line
        if line is None:
            return f"tried {tried}"
        parts = (
            f"{human_bytes(round(line.fixed_bytes))} fixed and {human_bytes(round(line.bytes_per_sample))} per sample"
        )
        stored = self._stored_per_sample()
        detail = "" if stored is None else f" ({human_bytes(stored)} of it stored for the backward pass)"
        return f"tried {tried}; {parts}{detail}; budget {human_bytes(self.budget_bytes)}"

    def _stored_per_sample(self) -> int | None:
        known = [trial for trial in self.fitting if trial.stored_bytes is not None]
        if len(known) < 2:
            return None
        (first, second) = known[-2:]
        assert first.stored_bytes is not None
        assert second.stored_bytes is not None
        # None where there was nothing to pack in the smaller batch, or the last step of either was cut short.
        growth = round((second.stored_bytes - first.stored_bytes) / (second.batch_size - first.batch_size))
        return growth if growth > 0 else None
