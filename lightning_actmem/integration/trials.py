"""Training steps on trial: real ones, with another batch size, measured, and everything as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..engine import ActMemEngine
from ..errors import ActMemError
from ..memory import collect, free_failed, held_bytes, is_out_of_memory
from ..peak import PeakMeter, ResidentMeter
from ..trial import Trial
from .kept import (
    forget_data,
    kept_checkpoint,
    kept_containers,
    kept_generators,
    kept_loop,
    kept_module_state,
    quiet_trainer,
    silent_lightning,
)
from .moments import told_moments
from .shadow import shadow

# The first trials run twice: tables and workspaces that are made once are no sample's.
_WARM_TRIALS = 2
_STEPS = 2  # gradients and optimizer state are there from the second step on


class BatchTrials:
    """Runs training steps with other batch sizes inside ``with``, and puts everything back at its end.

    Weights, optimizer and scheduler states, precision, loops, callbacks, random generators (the global ones and those
    that are attributes of the model, the datamodule, a loader or its sampler), buffers that no checkpoint has, metrics,
    the model's plain lists, dicts and sets and the batch size are as before afterwards. Loggers and callbacks are away
    meanwhile; the model's own hooks run, ``on_train_start`` and ``on_train_end`` too, in every trial.

    Args:
        trainer: A trainer whose ``fit`` has reached ``on_fit_start``.
        batch_arg_name: Name of the batch size's attribute on model, its ``hparams`` or the datamodule.
        engine: What compresses, to tell the bytes stored; ``None`` for plain training.
        resident: Whether the peak is that of the process's resident memory, on a CPU that tells it, instead of the
            tensors' alone: where memory itself will be the limit.

    Attributes:
        device: Where the steps run.
        error: The error by which memory ran out in this process in the last trial, or ``None``.

    Raises:
        ActMemError: On entering, if there is no such attribute, or the data does not follow it.
    """

    def __init__(
        self,
        trainer: Trainer,
        batch_arg_name: str = "batch_size",
        engine: ActMemEngine | None = None,
        resident: bool = False,
    ) -> None:
        self._trainer = trainer
        self._model: LightningModule = trainer.lightning_module
        self._name = batch_arg_name
        self._engine = engine
        self._stack = ExitStack()
        self._sizes: list[int] = []
        self._failed = False
        self._warm = 0
        self.error: BaseException | None = None
        self.device: torch.device = trainer.strategy.root_device
        self._is_resident = resident and self.device.type == "cpu" and ResidentMeter.is_supported()
        self._resident: ResidentMeter | None = None

    def __enter__(self) -> BatchTrials:
        with ExitStack() as stack:
            stack.enter_context(isolate_rng())
            self._check_source()
            stack.enter_context(kept_generators(self._holders()))  # before train_dataloader(), which may draw
            stack.enter_context(kept_generators(self._samplers()))  # before an iterator is made, which draws
            self._check_data()
            stack.callback(collect)
            stack.enter_context(kept_checkpoint(self._trainer))
            stack.enter_context(kept_module_state(self._model))
            stack.enter_context(kept_containers(self._model))
            stack.enter_context(kept_loop(self._trainer))
            stack.callback(self._set, lightning_getattr(self._model, self._name))
            stack.enter_context(quiet_trainer(self._trainer))
            stack.enter_context(self._counted_samples())
            if self._trainer.world_size > 1:
                stack.enter_context(self._failing_in_step())
            if self._is_resident:
                self._resident = ResidentMeter(self._held_bytes())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    @property
    def batch_size(self) -> int:
        """The batch size that is set now."""
        batch_size: Any = lightning_getattr(self._model, self._name)
        return int(batch_size)

    def limit(self) -> int | None:
        """Return the number of samples of this process in an epoch, or ``None`` for data without a length."""
        lengths = [len(loader.sampler) for loader in self._loaders() if not isinstance(loader.dataset, IterableDataset)]
        return min(lengths, default=None)

    def run(self, batch_size: int, *, moments: bool = False) -> Trial:
        """Train some steps with a batch size.

        Args:
            batch_size: Samples per step.
            moments: Whether to tell the peaks of the last step's moments apart; not of resident memory.

        Returns:
            What it took; the largest over all processes.

        Raises:
            ActMemError: If the data does not follow the attribute.
        """
        self._set(batch_size)
        self._reload_data()
        self._check_loaders(batch_size)
        self._failed = False
        self.error = None
        if self._warm < _WARM_TRIALS:
            self._attempt(batch_size, nullcontext())
            # Below `min_elements` nothing is packed, and what packing makes once is still to come.
            self._warm += 1 if self._packs() else 0
        self._forget_gradients()
        collect()
        self._sizes.clear()
        meter = self._resident or PeakMeter(self.device, self._held_bytes())
        with ExitStack() as stack:
            if moments and isinstance(meter, PeakMeter):
                stack.enter_context(told_moments(self._trainer, meter.begin, meter.mark))
            self._attempt(batch_size, meter)
        out_of_memory = self._failed
        self._forget_gradients()
        collect()
        resting = self._held_bytes() if self._resident is None else self._resident.resting_bytes()
        peak = 0 if out_of_memory else meter.peak_bytes
        limit = self.limit()
        # The last step may have had what is left over at the end of an epoch.
        is_whole = limit is None or limit >= _STEPS * batch_size or limit == batch_size
        stored = self._engine.ledger.peak_saved_bytes if self._engine and is_whole and not out_of_memory else None
        is_last_whole = not self._sizes or self._sizes[-1] == max(self._sizes)
        told = meter.moments if isinstance(meter, PeakMeter) and is_last_whole and not out_of_memory else ()
        return self._agreed(Trial(batch_size, peak, resting, stored, out_of_memory, self._short_of(batch_size), told))

    def _attempt(self, batch_size: int, context: AbstractContextManager[Any]) -> None:
        try:
            with context, silent_lightning(), self._unsynchronised():
                self._run_loop(batch_size)
        except (RuntimeError, MemoryError) as error:
            self._fail(error)

    def adopt(self, batch_size: int) -> None:
        """Set a batch size for good, after the trials."""
        self._set(batch_size)

    def _run_loop(self, batch_size: int) -> None:
        trainer = self._trainer
        loop = trainer.fit_loop
        loop.load_state_dict(deepcopy(self._loop_state))
        loop.restarting = False
        loop.epoch_progress.reset()
        if self._model.automatic_optimization:
            loop.epoch_loop.automatic_optimization.optim_progress.reset()
        else:
            loop.epoch_loop.manual_optimization.optim_step_progress.reset()
        limit = self.limit()
        # With less than two full batches the second step has what is left over; the third has a full one again.
        steps = _STEPS if limit is None or limit >= _STEPS * batch_size else _STEPS + 1
        loop.epoch_loop.max_steps = steps
        loop.max_epochs = steps  # every epoch has a step
        loop.run()

    @property
    def _loop_state(self) -> dict[str, Any]:
        return self._trainer.fit_loop.state_dict()

    def _check_source(self) -> None:
        trainer = self._trainer
        if not lightning_hasattr(self._model, self._name):
            raise ActMemError(
                f"the batch size must be an attribute {self._name!r} of the model, its hparams or the datamodule, and "
                f"there is none. Add `self.{self._name}` and build the DataLoader with it, or name another attribute "
                "with batch_arg_name."
            )
        if not trainer.fit_loop._data_source.is_module():
            raise ActMemError(
                "the batch size of a DataLoader that was given to fit() cannot be changed. Give fit() a model or a "
                "LightningDataModule with a train_dataloader() instead."
            )
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            raise ActMemError(
                f"trial steps need a strategy with one device or DDP, got {type(trainer.strategy).__name__}. "
                "Find the batch size on one device, or set it by hand."
            )

    def _check_data(self) -> None:
        self._trainer.fit_loop.setup_data()
        for loader in self._loaders():
            if not isinstance(loader, DataLoader) or loader.batch_size is None:
                raise ActMemError(
                    f"train_dataloader() must give a DataLoader with a batch size, got {type(loader).__name__} without "
                    f"one. Build it with DataLoader(..., batch_size=self.{self._name}); a batch_sampler or an iterable "
                    "that makes its own batches cannot be scaled."
                )

    def _check_loaders(self, batch_size: int) -> None:
        sizes = [loader.batch_size for loader in self._loaders()]
        if batch_size not in sizes:
            raise ActMemError(
                f"train_dataloader() must use the attribute {self._name!r}: it was set to {batch_size}, and the "
                f"DataLoader has batch size {sizes[0]}. Build it with DataLoader(..., batch_size=self.{self._name})."
            )

    def _loaders(self) -> list[Any]:
        combined = self._trainer.fit_loop._combined_loader
        assert combined is not None
        return list(combined.flattened)

    def _holders(self) -> list[Any]:
        """What may have random generators of its own: the model, its parts and the datamodule."""
        datamodule = self._trainer.datamodule  # type: ignore[attr-defined]
        return [*self._model.modules(), *([] if datamodule is None else [datamodule])]

    def _samplers(self) -> list[Any]:
        loaders = CombinedLoader(self._trainer.fit_loop._data_source.dataloader()).flattened
        return [owner for loader in loaders for owner in (loader, getattr(loader, "sampler", None))]

    def _set(self, batch_size: Any) -> None:
        lightning_setattr(self._model, self._name, batch_size)

    def _reload_data(self) -> None:
        forget_data(self._trainer)
        self._trainer.fit_loop.setup_data()

    def _forget_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None

    def _held_bytes(self) -> int:
        """Bytes of weights, buffers and optimizer state, and of DDP's gradient buckets, which are part of no module."""
        held = held_bytes(self._model, self._trainer.optimizers)
        if not isinstance(self._trainer.strategy.model, nn.parallel.DistributedDataParallel):
            return held
        return held + sum(p.numel() * p.element_size() for p in self._model.parameters() if p.requires_grad)

    def _unsynchronised(self) -> Any:
        """Keep processes from waiting in backward for one that has run out of memory."""
        model = self._trainer.strategy.model
        return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()

    def _packs(self) -> bool:
        """Whether the last steps have been what training is: plain, or with something packed."""
        ledger = None if self._engine is None else self._engine.ledger
        return ledger is None or ledger.peak_saved_bytes < ledger.peak_raw_bytes

    def _short_of(self, batch_size: int) -> int | None:
        """The largest number of samples in a step, if the data had fewer than asked for."""
        return max(self._sizes) if self._sizes and max(self._sizes) < batch_size else None

    @contextmanager
    def _counted_samples(self) -> Iterator[None]:
        """Note the samples of each step of data without a length, which may have fewer than one batch."""
        if self.limit() is not None:
            yield
            return
        strategy = self._trainer.strategy
        training_step = strategy.training_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._sizes.append(extract_batch_size(args[0]))
            return training_step(*args, **kwargs)

        with ExitStack() as stack:
            shadow(stack, strategy, training_step=counted)
            yield

    @contextmanager
    def _failing_in_step(self) -> Iterator[None]:
        """Let a process without memory go through the rest of its steps: the others wait for it after every batch."""
        strategy = self._trainer.strategy
        names = ("training_step", "backward", "optimizer_step")
        methods = {name: getattr(strategy, name) for name in names}

        def guarded(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not (self._failed and name == "training_step"):
                    try:
                        return methods[name](*args, **kwargs)
                    except (RuntimeError, MemoryError) as error:
                        self._fail(error)
                weight = next(parameter for parameter in self._model.parameters() if parameter.requires_grad)
                return 0 * weight.sum() if name == "training_step" else None

            return call

        with ExitStack() as stack:
            shadow(stack, strategy, **{name: guarded(name) for name in names})
            yield

    def _fail(self, error: BaseException) -> None:
        """Note that memory has run out, and free what the step held; any other error goes on."""
        if not is_out_of_memory(error):
            raise error
        self._failed = True
        free_failed(error)
        # A process that goes on after the error is still inside Lightning's frames, which hold the batch.
        self.error = error if self._trainer.world_size == 1 else error.with_traceback(None)

    def explain(self) -> str:
        """Return the error of the last trial in words, for the end of a message; empty if it had none."""
        return "" if self.error is None else f" The last error was {type(self.error).__name__}: {self.error}"

    def _agreed(self, trial: Trial) -> Trial:
        """Return what the process that needed most has found."""
        if self._trainer.world_size == 1:
            return trial
        samples = -1 if trial.samples is None else -trial.samples
        mine = torch.tensor(
            [trial.peak_bytes, trial.resting_bytes, trial.stored_bytes or 0, int(trial.out_of_memory), samples],
            dtype=torch.int64,
            device=self.device,
        )
        peak, resting, stored, out_of_memory, short = self._reduced(mine)
        fewest = None if trial.samples is None else -short
        return Trial(
            trial.batch_size,
            0 if out_of_memory else peak,
            resting,
            None if trial.stored_bytes is None else stored,
            bool(out_of_memory),
            fewest,
        )

    def _reduced(self, values: torch.Tensor) -> list[int]:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return [int(value) for value in values.tolist()]

    def smallest(self, value: int) -> int:
        """Return the smallest of the processes' values."""
        if self._trainer.world_size == 1:
            return value
        return -self._reduced(torch.tensor([-value], dtype=torch.int64, device=self.device))[0]
