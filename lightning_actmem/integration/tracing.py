"""A few training steps with two small batches, where training would begin: what a plan is made from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from ..adapt.adapter import Adapter
from ..engine import ActMemEngine
from ..envelope import Envelope
from ..errors import ActMemError
from ..report import StepReport
from ..trial import Trial
from .adaptation import CHECK_FACTOR, MAX_PASSES
from .callback import ActMem
from .kept import silent_lightning
from .measuring import SUB_BATCHES, measure
from .shadow import shadow
from .trials import BatchTrials

# A deep model has more sites than one adaptation measures; each of these is 32 backward passes on half a small batch.
_MAX_ADAPTATIONS = 8


@dataclass(frozen=True)
class Traced:
    """Two batch sizes of one way to train.

    Args:
        trials: What they took.
        reports: What they stored by layer and kind; empty for plain training.
        batch_size: The batch size that is set.
        noise: Noise of the bits that were chosen, as measured last; ``None`` where none were.
        reason: Why no bits could be chosen, else empty.
    """

    trials: tuple[Trial, Trial]
    reports: tuple[StepReport, ...]
    batch_size: int
    noise: float | None = None
    reason: str = ""

    @property
    def envelope(self) -> Envelope:
        """Peak memory over the batch size."""
        return Envelope.through(*self.trials)

    def at(self, batch_size: int, first: int, second: int) -> int:
        """Continue the line through two figures, in whole numbers: exact for what is exactly linear."""
        small, large = (trial.batch_size for trial in self.trials)
        return first + (second - first) * (batch_size - small) // (large - small)


class Tracer:
    """Traces a model under changing conditions.

    Args:
        model: The module; its state is as before afterwards.
        datamodule: The data, unless the model brings its own.
        trace: The two batch sizes.
        batch_arg_name: Name of the batch size's attribute.
        accelerator: Where to run.
    """

    def __init__(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        trace: Sequence[int],
        batch_arg_name: str,
        accelerator: str,
    ) -> None:
        self._model = model
        self._datamodule = datamodule
        self._trace = trace
        self._name = batch_arg_name
        self._accelerator = accelerator

    def trace(self, actmem: ActMem | None = None) -> Traced:
        """Run the steps, packed if a callback for that is given; one that adapts chooses its bits first.

        Raises:
            ActMemError: If the batch size cannot be set, or the small batches do not fit.
        """
        probe = _Probe(self._trace, self._name, None if actmem is None else actmem.engine)
        with isolate_rng(), silent_lightning(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(GPU|MPS) available but not used.*")
            trainer = Trainer(
                accelerator=self._accelerator,
                devices=1,
                callbacks=[probe] if actmem is None else [actmem, probe],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                max_steps=0,
            )
            trainer.fit(self._model, datamodule=self._datamodule)
        assert probe.traced is not None
        return probe.traced


class _Probe(Callback):
    """Runs the steps with small batches where training would begin."""

    def __init__(self, trace: Sequence[int], batch_arg_name: str, engine: ActMemEngine | None) -> None:
        self._trace = trace
        self._name = batch_arg_name
        self._engine = engine
        self.traced: Traced | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        reports: list[StepReport] = []
        found: list[Trial] = []
        noise, reason = None, ""
        with BatchTrials(trainer, self._name, self._engine) as trials:
            limit = trials.limit()
            if limit is not None and max(self._trace) > limit:
                raise ActMemError(
                    f"trace must be within the {limit} samples of the data, got {list(self._trace)}. Give smaller ones."
                )
            if self._engine is not None and self._engine.adapter is not None:
                with _seen_batches(trainer) as batches:
                    self._run(trials, self._trace[1])
                if limit is None or limit < 2 * self._trace[1]:
                    del batches[1:]  # of what is left at the end of an epoch
                noise, reason = _chosen_bits(trainer, self._engine, self._engine.adapter, batches)
                batches.clear()  # they would be part of the peak
            for batch_size in self._trace:
                found.append(self._run(trials, batch_size))
                if self._engine is not None:
                    reports.append(self._engine.report())
        trainer.limit_train_batches = 0  # nothing is trained: no loader is built that would draw once more
        self.traced = Traced((found[0], found[1]), tuple(reports), trials.batch_size, noise, reason)

    def _run(self, trials: BatchTrials, batch_size: int) -> Trial:
        trial = trials.run(batch_size, moments=True)
        if trial.out_of_memory:
            raise ActMemError(
                f"memory ran out with the small batches {list(self._trace)}. Give smaller ones as trace."
                f"{trials.explain()}"
            ) from trials.error
        return trial


@contextmanager
def _seen_batches(trainer: Trainer) -> Iterator[list[Any]]:
    """Note the batches that training steps get."""
    training_step = trainer.strategy.training_step
    seen: list[Any] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[0])
        return training_step(*args, **kwargs)

    with ExitStack() as stack:
        shadow(stack, trainer.strategy, training_step=noting)
        yield seen


def _chosen_bits(
    trainer: Trainer, engine: ActMemEngine, adapter: Adapter, batches: Sequence[Any]
) -> tuple[float | None, str]:
    """Set the engine's plan as adaptations in a run would, one after the other until nothing is left to measure.

    Returns:
        The noise of the plan as measured last, and why there is none, else an empty text.
    """
    limit = engine.config.noise
    noise, known = None, 0
    for number in range(_MAX_ADAPTATIONS):
        reason = measure(trainer, engine, batches[number % len(batches)], 0, MAX_PASSES, share=SUB_BATCHES)
        if reason:
            return None, reason
        noise = adapter.measured_noise  # of the plan until now
        before, known = known, len(adapter.sensitivities.averages)
        if known == before and noise is not None and limit is not None and noise <= CHECK_FACTOR * limit:
            break
        adapter.allocate()
    return noise, ""
