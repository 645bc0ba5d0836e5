"""One measurement in a run of the Trainer: on parts of the batch at hand, on all ranks or on none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_actmem_kernels import CodecSpec

from ..adapt.adapter import Adapter
from ..engine import ActMemEngine
from .quiet import quiet, quiet_loss
from .ranks import Join, NotMeasuredError
from .sub_batch import cut

SUB_BATCHES = 2
MIN_SHARE = 8
# Sites with less than this share of the stored bytes may be left out of a measurement.
NEGLIGIBLE = 0.05
MIN_SHARE_BATCH_NORM = 4  # with fewer samples the batch's own statistics are too far from those of training


def measure(
    trainer: Trainer, engine: ActMemEngine, batch: Any, batch_idx: int, max_passes: int, share: int | None = None
) -> str:
    """Have the engine's adapter measure on parts of a batch, unseen by the rest of the run.

    Args:
        trainer: The trainer, in ``fit``.
        engine: The engine; it adapts.
        batch: The batch that is about to be trained on.
        batch_idx: Its number.
        max_passes: Backward passes on parts of the batch.
        share: Each of the two parts holds this fraction (``1 / share``) of the batch; ``None``: so little that a probe
            takes no more memory than training does.

    Returns:
        Why nothing was measured, else an empty text. Either all ranks have measured or none has.
    """
    adapter = engine.adapter
    assert adapter is not None, "the engine must adapt"
    module = trainer.lightning_module
    reason = refusal(trainer) if adapter.sizes.uses else "nothing has been packed that could have other bits"
    parts: Sequence[Any] = ()
    samples = 1
    has_batch_norm = any(isinstance(layer, _BatchNorm) for layer in module.modules())
    if share is None:
        share = max(_share(engine, adapter), MIN_SHARE_BATCH_NORM if has_batch_norm else MIN_SHARE)
    if not reason:
        # Batch norm refuses a single sample.
        parts, samples, reason, total = cut(batch, count=SUB_BATCHES, share=share, least=2 if has_batch_norm else 1)
        reason = reason or _too_small(engine, adapter, samples, total)
    if not trainer.strategy.reduce_boolean_decision(not reason, all=True):
        return reason or "another process cannot measure"
    scale = _loss_scale(trainer, share)
    # Variances fall with the number of samples, and the parts may be larger or smaller next time.
    join = Join(trainer, samples / scale**2)
    adapter.gather = join
    try:
        with quiet(trainer):
            closures = [partial(_loss, trainer, part, batch_idx, scale) for part in parts]
            adapter.measure(module, closures, inputs=parts, max_passes=max_passes)
    except Exception as error:  # whatever a step of the user's does on part of a batch: training has to go on
        join.excuse()
        return str(error) if isinstance(error, NotMeasuredError) else f"{type(error).__name__}: {error}"
    finally:
        adapter.gather = None
    return ""


def refusal(trainer: Trainer) -> str:
    """Return why nothing can be measured in this run, or an empty text."""
    module, model = trainer.lightning_module, trainer.strategy.model
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "training_step(dataloader_iter) fetches its batches itself"
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        return "the parameters are sharded (DTensor), their gradient cannot be taken layer by layer"
    if not (model is module or isinstance(model, DistributedDataParallel)):
        return f"under {type(trainer.strategy).__name__} the model cannot be run by itself"
    return ""


def _too_small(engine: ActMemEngine, adapter: Adapter, samples: int, total: int) -> str:
    """Return a reason where much of what training packs is too small for that in a part of the batch, else nothing."""
    least = engine.config.min_elements
    seen_bytes = all_bytes = 0
    for site, use in adapter.sizes.uses.items():
        stored_bytes = use.stored_bytes(engine.plan.get(site, use.default))
        all_bytes += stored_bytes
        if max(use.numels) * samples >= least * total:
            seen_bytes += stored_bytes
    if seen_bytes >= (1 - NEGLIGIBLE) * all_bytes:
        return ""
    return (
        f"only {seen_bytes / all_bytes:.0%} of the stored bytes could be measured on {samples} of {total} samples, the "
        f"rest is in tensors of less than min_elements={least} there. Take larger batches, or lower min_elements"
    )


def _share(engine: ActMemEngine, adapter: Adapter) -> int:
    """Return into how many parts to cut a batch, so that a probe of one takes no more than a batch in training."""
    compact = CodecSpec("uniform", bits=8, group_size=engine.config.group_size)
    # Not from the ledger: the first step after a checkpoint has to measure as it would have without a break.
    uses, fixed_bytes = adapter.sizes.uses, adapter.sizes.fixed_bytes
    probe_bytes = fixed_bytes + sum(use.stored_bytes(compact) for use in uses.values())
    step_bytes = fixed_bytes + sum(use.stored_bytes(engine.plan.get(site, use.default)) for site, use in uses.items())
    return math.ceil(probe_bytes / max(step_bytes, 1))


def _loss_scale(trainer: Trainer, share: int) -> float:
    """Return the factor that brings float16 gradients to where they are in training: neither vanishing nor infinite."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # In the mean over a part of a batch each sample counts that much more.
    return 1.0 if scaler is None else float(scaler.get_scale()) / share


def _loss(trainer: Trainer, batch: Any, batch_idx: int, scale: float) -> Tensor:
    loss = quiet_loss(trainer, batch, batch_idx)
    return loss if scale == 1 else loss * scale
