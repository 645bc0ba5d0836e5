"""When the bits adapt in a run of the Trainer, and on which data; what comes of it is kept as history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from ..adapt.adapter import Adapter, Change
from ..engine import ActMemEngine
from ..errors import ActMemWarning
from .history import Record, layer_bits
from .measuring import NEGLIGIBLE, measure, refusal

# By then loss and gradients have left the scale of the initial weights, and the batches after it are spared bits that
# the first look already shows to be wasted or missing.
FIRST_BATCH = 10
MAX_PASSES = 32
# What two parts of a batch take to compare the whole plan with the exact gradient, and one to spare.
CHECK_PASSES = 5
MAX_CHECKS = 3
# A batch may be an exception (the step skips it, its gradient overflows): then the next one is asked.
MAX_TRIES = 3
CHECK_FACTOR = 1.2  # a measurement of the noise scatters by about as much
# Batches after an adaptation at which its plan is checked again: on a transformer the noise of one plan grew by half
# within 90 batches. Few enough that they take about half a percent of 1,000 steps.
LATER_CHECKS = (16, 64, 256, 1024, 4096)
GUARD_FACTOR = 1.5


class Adaptation:
    """Measures on parts of a training batch and sets the plan: once an epoch or every so many batches.

    The first time comes after `FIRST_BATCH` batches, or at the second epoch if that is earlier; a batch that cannot be
    measured leaves it to the next, `MAX_TRIES` in all. Where the noise has a limit, a new plan is checked at the next
    batch, with few passes, and now and then after it (`LATER_CHECKS`): if it makes more noise than it was held to, bits
    go up at once. Under several processes each measures on its own batch, what they have measured is joined, and all
    take rank zero's plan.
    """

    def __init__(self) -> None:
        #: What every adaptation has found, oldest first.
        self.history: list[Record] = []
        #: Whether a batch size has been searched for: then no plan stores more than the trials have.
        self.capped = False
        #: Whether batches of a run have been seen since the state was made or loaded.
        self.has_run = False
        self._batches = 0
        self._last_batch: int | None = None
        self._last_epoch: int | None = None
        self._checks = 0
        self._failures = 0
        self._warned = False

    def start_batch(self, trainer: Trainer, engine: ActMemEngine, batch: Any, batch_idx: int) -> Record | None:
        """Adapt if it is time to; call it in ``on_train_batch_start``.

        Args:
            trainer: The trainer.
            engine: Whose plan adapts.
            batch: The batch that is about to be trained on.
            batch_idx: Its number.

        Returns:
            What was found, or ``None`` where nothing was measured.
        """
        if engine.adapter is None:
            return None
        self.has_run = True
        if self._last_epoch is None:
            self._last_epoch = trainer.current_epoch
        number = self._batches
        self._batches += 1
        is_due = self._is_due(number, trainer.current_epoch, engine.config.adapt_every)
        has_plan = bool(self.history) and not self._failures
        is_later = has_plan and engine.config.noise is not None and number - (self._last_batch or 0) in LATER_CHECKS
        if not is_due and not self._checks and not is_later:
            return None
        reason = measure(trainer, engine, batch, batch_idx, MAX_PASSES if is_due else CHECK_PASSES)
        if reason:
            self._fail(trainer, number, is_due, reason)
            return None
        self._failures = 0
        if is_due:
            self._last_batch, self._last_epoch = number, trainer.current_epoch
        factor = 0.0 if is_due else CHECK_FACTOR if self._checks else 1.0
        record = self._record(trainer, engine, engine.adapter, factor)
        has_limit = engine.config.noise is not None and bool(record.changes)
        self._checks = (self._checks - 1 if self._checks and not is_due else MAX_CHECKS) if has_limit else 0
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain numbers and texts."""
        return {
            "batches": self._batches,
            "last_batch": self._last_batch,
            "last_epoch": self._last_epoch,
            "checks": self._checks,
            "failures": self._failures,
            "capped": self.capped,
            "history": [record.state() for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        self._batches = state["batches"]
        self._last_batch = state["last_batch"]
        self._last_epoch = state["last_epoch"]
        self._checks = state["checks"]
        self._failures = state["failures"]
        self.capped = self.capped or state["capped"]
        self.has_run = False
        self.history = [Record.of(record) for record in state["history"]]

    def _is_due(self, number: int, epoch: int, every: int) -> bool:
        if self._last_batch is None:
            return number >= min(FIRST_BATCH, every or FIRST_BATCH) or epoch != self._last_epoch
        return number - self._last_batch >= every if every else epoch != self._last_epoch

    def _fail(self, trainer: Trainer, number: int, is_due: bool, reason: str) -> None:
        """Try again with the next batch, unless several have failed in a row."""
        if not is_due:
            self._checks = max(self._checks - 1, 0)  # the next batch checks as well
            return
        self._checks = 0
        self._failures += 1
        if refusal(trainer) or self._failures % MAX_TRIES == 0:
            self._last_batch, self._last_epoch = number, trainer.current_epoch
            self._warn_once(reason)

    def _record(self, trainer: Trainer, engine: ActMemEngine, adapter: Adapter, factor: float) -> Record:
        """Set the plan by what has been measured, and note both.

        Args:
            trainer: The trainer.
            engine: Whose plan adapts.
            adapter: What has measured.
            factor: How many times the noise that is allowed a check lets pass; 0 for an adaptation.
        """
        can_tell = engine.config.method == "actmem" and _knows_most(engine, adapter)
        noise, limit = adapter.measured_noise or 0.0, engine.config.noise
        changes: list[Change] = []
        if not factor or (limit is not None and noise > factor * limit):
            adapter.capped = self.capped
            changes = adapter.allocate()
        record = Record(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            noise=noise,
            predicted_noise=adapter.expected_noise or 0.0,
            planned_noise=adapter.predicted_noise or 0.0,
            bits=layer_bits(adapter.sizes.uses, engine.plan),
            is_check=factor > 0,
            changes=tuple(map(str, changes)),
        )
        if trainer.world_size > 1:
            # The ranks may store tensors of other sizes, and would not all choose the same.
            engine.plan, record = trainer.strategy.broadcast((dict(engine.plan), record))
        self.history.append(record)
        if can_tell:
            _guard(record)
        return record

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"ActMem: the bits do not adapt, the present ones stay: {reason}. This is said once.",
                category=ActMemWarning,
            )


def _knows_most(engine: ActMemEngine, adapter: Adapter) -> bool:
    """Whether nearly every byte's site has been measured: in a deep model that takes more than one adaptation."""
    known_bytes = all_bytes = 0
    for site, use in adapter.sizes.uses.items():
        spec = engine.plan.get(site, use.default)
        stored_bytes = use.stored_bytes(spec)
        all_bytes += stored_bytes
        if adapter.sensitivities.variance(site, spec) is not None:
            known_bytes += stored_bytes
    return known_bytes >= (1 - NEGLIGIBLE) * all_bytes


def _guard(record: Record) -> None:
    """Warn where the sum over the sites does not tell what all of them together do."""
    low, high = sorted((record.noise, record.predicted_noise))
    if high > GUARD_FACTOR * low:
        rank_zero_warn(
            f"ActMem: the gradient noise is {record.noise:.3g} as measured and {record.predicted_noise:.3g} as "
            f"predicted, more than a factor of {GUARD_FACTOR} apart: the sum over the sites does not hold here.",
            category=ActMemWarning,
        )
