"""When the bits adapt in a run of the Trainer, and on which data; what comes of it is kept as history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_actmem_kernels import CodecSpec

from ..adapt.adapter import Adapter
from ..engine import ActMemEngine
from ..errors import ActMemWarning
from .history import Record, layer_bits
from .quiet import quiet, quiet_loss
from .ranks import Join, NotMeasuredError
from .sub_batch import cut

# By then loss and gradients have left the scale of the initial weights, and the batches after it are spared bits that
# the first look already shows to be wasted or missing.
FIRST_BATCH = 10
SUB_BATCHES = 2
MIN_SHARE = 8
MIN_SHARE_BATCH_NORM = 4  # with fewer samples the batch's own statistics are too far from those of training
MAX_PASSES = 32
GUARD_FACTOR = 1.5


class Adaptation:
    """Measures on parts of a training batch and sets the plan: once an epoch or every so many batches.

    The first time comes after `FIRST_BATCH` batches, or at the second epoch if that is earlier. Under several
    processes each measures on its own batch, what they have measured is joined, and all take rank zero's plan.
    """

    def __init__(self) -> None:
        #: What every adaptation has found, oldest first.
        self.history: list[Record] = []
        #: Whether a batch size has been searched for: then no plan stores more than the trials have.
        self.capped = False
        self._batches = 0
        self._last_batch: int | None = None
        self._last_epoch: int | None = None
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
        if self._last_epoch is None:
            self._last_epoch = trainer.current_epoch
        number = self._batches
        self._batches += 1
        if not self._is_due(number, trainer.current_epoch, engine.config.adapt_every):
            return None
        self._last_batch, self._last_epoch = number, trainer.current_epoch
        reason = self._measure(trainer, engine, engine.adapter, batch, batch_idx)
        if reason:
            self._warn_once(reason)
            return None
        return self._allocate(trainer, engine, engine.adapter)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain numbers and texts."""
        return {
            "batches": self._batches,
            "last_batch": self._last_batch,
            "last_epoch": self._last_epoch,
            "capped": self.capped,
            "history": [record.state() for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        self._batches = state["batches"]
        self._last_batch = state["last_batch"]
        self._last_epoch = state["last_epoch"]
        self.capped = state["capped"]
        self.history = [Record.of(record) for record in state["history"]]

    def _is_due(self, number: int, epoch: int, every: int) -> bool:
        if self._last_batch is None:
            return number >= min(FIRST_BATCH, every or FIRST_BATCH) or epoch != self._last_epoch
        return number - self._last_batch >= every if every else epoch != self._last_epoch

    def _measure(
        self, trainer: Trainer, engine: ActMemEngine, adapter: Adapter, batch: Any, batch_idx: int
    ) -> str | None:
        """Measure; return why it could not be done, the same on all ranks in that none or all have done it."""
        module = trainer.lightning_module
        reason = _refusal(trainer) if adapter.sizes.uses else "nothing has been packed that could have other bits"
        parts: Sequence[Any] = ()
        samples = 0
        if not reason:
            has_batch_norm = any(isinstance(layer, _BatchNorm) for layer in module.modules())
            share = max(_share(engine, adapter), MIN_SHARE_BATCH_NORM if has_batch_norm else MIN_SHARE)
            # Batch norm refuses a single sample.
            parts, samples, reason = cut(batch, count=SUB_BATCHES, share=share, least=2 if has_batch_norm else 1)
        if not trainer.strategy.reduce_boolean_decision(not reason, all=True):
            return reason or "another process cannot measure"
        scale = _loss_scale(trainer)
        # Variances fall with the number of samples, and the parts may be larger or smaller next time.
        join = Join(trainer, samples / scale**2)
        adapter.gather = join
        try:
            with quiet(trainer):
                closures = [partial(_loss, trainer, part, batch_idx, scale) for part in parts]
                adapter.measure(module, closures, inputs=parts, max_passes=MAX_PASSES)
        except Exception as error:  # whatever a step of the user's does on part of a batch: training has to go on
            join.excuse()
            return str(error) if isinstance(error, NotMeasuredError) else f"{type(error).__name__}: {error}"
        finally:
            adapter.gather = None
        return None

    def _allocate(self, trainer: Trainer, engine: ActMemEngine, adapter: Adapter) -> Record:
        can_tell = engine.config.method == "actmem" and _knows_all(engine, adapter)
        adapter.capped = self.capped
        changes = adapter.allocate()
        record = Record(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            noise=adapter.measured_noise or 0.0,
            predicted_noise=adapter.expected_noise or 0.0,
            planned_noise=adapter.predicted_noise or 0.0,
            bits=layer_bits(adapter.sizes.uses, engine.plan),
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


def _refusal(trainer: Trainer) -> str:
    """Return why nothing can be measured in this run, or an empty text."""
    module, model = trainer.lightning_module, trainer.strategy.model
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "training_step(dataloader_iter) fetches its batches itself"
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        return "the parameters are sharded (DTensor), their gradient cannot be taken layer by layer"
    if not (model is module or isinstance(model, DistributedDataParallel)):
        return f"under {type(trainer.strategy).__name__} the model cannot be run by itself"
    return ""


def _share(engine: ActMemEngine, adapter: Adapter) -> int:
    """Return into how many parts to cut a batch, so that a probe of one takes no more than a batch in training."""
    compact = CodecSpec("uniform", bits=8, group_size=engine.config.group_size)
    # Not from the ledger: the first step after a checkpoint has to measure as it would have without a break.
    uses, fixed_bytes = adapter.sizes.uses, adapter.sizes.fixed_bytes
    probe_bytes = fixed_bytes + sum(use.stored_bytes(compact) for use in uses.values())
    step_bytes = fixed_bytes + sum(use.stored_bytes(engine.plan.get(site, use.default)) for site, use in uses.items())
    return math.ceil(probe_bytes / max(step_bytes, 1))


def _loss_scale(trainer: Trainer) -> float:
    """Return the factor that keeps float16 gradients from vanishing."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _loss(trainer: Trainer, batch: Any, batch_idx: int, scale: float) -> Tensor:
    loss = quiet_loss(trainer, batch, batch_idx)
    return loss if scale == 1 else loss * scale


def _knows_all(engine: ActMemEngine, adapter: Adapter) -> bool:
    """Whether every site has been measured: in a deep model that takes more than one adaptation."""
    return all(
        adapter.sensitivities.variance(site, engine.plan.get(site, use.default)) is not None
        for site, use in adapter.sizes.uses.items()
    )


def _guard(record: Record) -> None:
    """Warn where the sum over the sites does not tell what all of them together do."""
    low, high = sorted((record.noise, record.predicted_noise))
    if high > GUARD_FACTOR * low:
        rank_zero_warn(
            f"ActMem: the gradient noise is {record.noise:.3g} as measured and {record.predicted_noise:.3g} as "
            f"predicted, more than a factor of {GUARD_FACTOR} apart: the sum over the sites does not hold here.",
            category=ActMemWarning,
        )
