"""`ActMemBatchSizeFinder`: the largest batch that fits, predicted from small ones instead of searched."""

from __future__ import annotations

import warnings
from functools import partial

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from ..engine import ActMemEngine
from ..errors import ActMemError, ActMemWarning
from ..memory import available_bytes, held_bytes, human_bytes, return_freed_memory
from ..predict import BatchSearch
from ..units import parse_bytes
from .callback import ActMem
from .trials import BatchTrials

# Beside its tensors a process on the CPU grows by some MiB in its first steps, and what it takes scatters as much.
_GROWTH_BYTES, _SPREAD_BYTES = 4 * 2**20, 2**20


class ActMemBatchSizeFinder(Callback):
    """Sets the largest batch size that fits into memory before training begins.

    Runs a few real training steps with two small batches, separates what is fixed (weights, gradients, optimizer
    state, workspace) from what each sample takes, predicts the largest batch, and makes sure with one or two more
    trials, smaller ones if need be. The batch that it ends on has run. `BatchTrials` says what is as before afterwards;
    the model's hooks run in every trial, ``on_train_start`` and ``on_train_end`` too.

    Works with and without compression, on one device and under DDP, where all processes take the same batch: the
    smallest of what they can hold. Without a budget on the CPU, glibc gives freed tensors back at once from then on
    (`memory.return_freed_memory`). Lightning's `BatchSizeFinder` doubles instead, takes some errors for bugs that are
    lack of memory, and refuses DDP.

    Args:
        budget: What may be allocated at one time: bytes, or a text such as ``"4GiB"`` or ``"1000000"``.
            ``None``: what the device has.
        batch_arg_name: Name of the batch size's attribute on the model, its ``hparams`` or the datamodule.
        start: Batch size of the first trial.
        max_batch_size: Never go beyond it; the number of samples is a limit anyway.
        max_trials: Trials at most; more only as long as none has fitted.
        margin: Share of the device's memory that is left alone, for the allocator's fragments, and 4 MiB at least on
            the CPU, for what the process grows by in a run; not of a ``budget``.

    Attributes:
        batch_size: What was found, or ``None``.
        search: The trials, and the line through them.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is not a number where one is needed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> finder = ActMemBatchSizeFinder(budget="4GiB")
        >>> trainer = Trainer(callbacks=[ActMem(), finder], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        budget: int | str | None = None,
        *,
        batch_arg_name: str = "batch_size",
        start: int = 8,
        max_batch_size: int | None = None,
        max_trials: int = 4,
        margin: float = 0.02,
    ) -> None:
        for name, value, least in (
            ("start", start, 1),
            ("max_batch_size", max_batch_size, 1),
            ("max_trials", max_trials, 3),
        ):
            if value is not None and type(value) is not int:
                raise TypeError(f"{name} must be a whole number, got {value!r}.")
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}.")
        if not isinstance(margin, (int, float)):
            raise TypeError(f"margin must be a number, got {margin!r}.")
        if not 0 <= margin < 1:
            raise ValueError(f"margin must be a share from 0 to below 1, got {margin}.")
        self._budget = None if budget is None else parse_bytes(budget)
        self._name = batch_arg_name
        self._start = start
        self._max_batch_size = max_batch_size
        self._max_trials = max_trials
        self._margin = margin
        self.batch_size: int | None = None
        self.search: BatchSearch | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the batch size and set it.

        Raises:
            ActMemError: If there is no batch size to set, the data does not follow it, or one sample does not fit.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("ActMemBatchSizeFinder: fast_dev_run is on, the batch size stays as it is.")
            return
        # Without a budget memory itself is the limit, and what the profiler takes would count.
        is_real = self._budget is None
        if is_real and trainer.strategy.root_device.type == "cpu":
            return_freed_memory()
        with BatchTrials(trainer, self._name, engine_of(trainer), resident=is_real) as trials:
            search = self.search = self._new_search(trainer, trials)
            found = search.run(partial(trials.run, moments=True))
        self._conclude(trials, found)

    def _new_search(self, trainer: Trainer, trials: BatchTrials) -> BatchSearch:
        held = held_bytes(trainer.lightning_module, trainer.optimizers)
        budget = self._budget
        is_process = budget is None and trials.device.type == "cpu"
        if budget is None:
            available = available_bytes(trials.device, held)
            budget = available - max(int(self._margin * available), _GROWTH_BYTES if is_process else 0)
        budget = trials.smallest(budget)
        if budget <= held:
            raise ActMemError(
                f"the budget must be more than the {human_bytes(held)} that the model's weights and buffers take, got "
                f"{human_bytes(budget)}. Raise the budget or train a smaller model."
            )
        limits = [limit for limit in (trials.limit(), self._max_batch_size) if limit is not None]
        limit = trials.smallest(min(limits)) if limits else None
        spread_bytes = _SPREAD_BYTES if is_process else 0
        return BatchSearch(budget, self._start, limit, self._max_trials, spread_bytes=spread_bytes)

    def _conclude(self, trials: BatchTrials, found: int | None) -> None:
        search = self.search
        assert search is not None
        if found is None:
            raise ActMemError(
                f"not even one sample fits into {human_bytes(search.budget_bytes)}: {search.explain()}. "
                f"Raise the budget, use fewer bits, or train a smaller model.{trials.explain()}"
            ) from trials.error
        if not search.grows and found != self._max_batch_size:
            warnings.warn(
                f"ActMem: memory does not grow with the batch ({search.explain()}), so there is no largest one. "
                f"{self._name} stays {trials.batch_size}; set it by hand.",
                ActMemWarning,
                stacklevel=2,
            )
            return
        self.batch_size = found
        trials.adopt(found)
        rank_zero_info(f"ActMemBatchSizeFinder: {self._name}={found}; {search.explain()}.")


def engine_of(trainer: Trainer) -> ActMemEngine | None:
    """Return the engine that compresses this trainer's steps, or ``None`` for plain training."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback.engine for callback in callbacks if isinstance(callback, ActMem)), None)
