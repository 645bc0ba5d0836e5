"""`plan`: what training will store and take at its peak, before it begins, from a few steps with small batches."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.checkpoint import checkpoint

from ..config import ConfigLike, given_settings
from ..engine import ActMemEngine
from ..errors import ActMemError
from ..predict import Line, Trial
from ..report import StepReport
from ..saved.ledger import BORROWED
from ..units import parse_bytes
from .callback import ActMem
from .kept import silent_lightning
from .memory_plan import LayerPlan, MemoryPlan, MethodPlan
from .trials import BatchTrials

PLAIN = "plain"
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class _Traced:
    """Two batch sizes of one method: what they took, and stored by layer and kind."""

    trials: tuple[Trial, Trial]
    reports: tuple[StepReport, ...]


class _Probe(Callback):
    """Runs the steps with small batches where training would begin."""

    def __init__(self, trace: Sequence[int], batch_arg_name: str, engine: ActMemEngine | None) -> None:
        self._trace = trace
        self._name = batch_arg_name
        self._engine = engine
        self.traced: _Traced | None = None
        self.batch_size = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        reports = []
        found = []
        with BatchTrials(trainer, self._name, self._engine) as trials:
            limit = trials.limit()
            if limit is not None and max(self._trace) > limit:
                raise ActMemError(
                    f"trace must be within the {limit} samples of the data, got {list(self._trace)}. Give smaller ones."
                )
            for batch_size in self._trace:
                found.append(trials.run(batch_size))
                if found[-1].out_of_memory:
                    raise ActMemError(
                        f"memory ran out with the small batches {list(self._trace)}. Give smaller ones as trace."
                        f"{trials.explain()}"
                    ) from trials.error
                if self._engine is not None:
                    reports.append(self._engine.report())
        self.batch_size = trials.batch_size
        trainer.limit_train_batches = 0  # nothing is trained: no loader is built that would draw once more
        self.traced = _Traced((found[0], found[1]), tuple(reports))


def plan(
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    bits: Sequence[int] = (8, 4, 2),
    batch_size: int | None = None,
    budget: int | str | None = None,
    config: ConfigLike = None,
    checkpointed: Sequence[str] = (),
    trace: Sequence[int] = (32, 64),
    batch_arg_name: str = "batch_size",
    accelerator: str = "cpu",
) -> MemoryPlan:
    """Predict what training stores and takes at its peak, for plain training and with compressed activations.

    Runs two real training steps with each of two small batches and continues the straight line through them. Stored
    bytes are exact where tensors fill whole groups in the small batches too; the peak is the more accurate the larger
    the small batches are, because the temporaries of packing stop growing from some size of tensor on.

    Args:
        model: The module; its state is as before afterwards (`BatchTrials` says what of it).
        datamodule: The data, unless the model brings its own.
        bits: Widths to compare with plain training.
        batch_size: The batch to predict for; ``None``: the one that is set.
        budget: Memory to fill: bytes or a text such as ``"80GiB"`` or ``"1000000"``; ``None``: no largest batch
            is predicted.
        config: Other settings of `ActMemConfig`.
        checkpointed: Patterns of submodules (``"blocks.*"``) for a row with ``torch.utils.checkpoint`` around each.
        trace: The two small batch sizes.
        batch_arg_name: Name of the batch size's attribute on model, its ``hparams`` or the datamodule.
        accelerator: Where to run the small batches.

    Returns:
        The plan.

    Raises:
        ValueError: If ``budget`` is no amount, ``trace`` is not two growing sizes, ``batch_size`` is not positive, or
            nothing matches ``checkpointed``.
        ActMemError: If the batch size cannot be set, or even the small batches do not fit.
    """
    if len(trace) != 2 or not 0 < trace[0] < trace[1]:
        raise ValueError(f"trace must be exactly two batch sizes, the smaller one first, got {list(trace)}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")
    # Where tensors are makes no difference to what is stored, and the small batches may well run on the CPU.
    settings = {**given_settings(config), "summary": False, "offload": False}
    budget_bytes = None if budget is None else parse_bytes(budget)
    probe = partial(_probe, model, datamodule, trace, batch_arg_name, accelerator)
    methods: list[MethodPlan] = []
    layers: dict[tuple[str, str], LayerPlan] = {}
    target = batch_size or 0
    cases: list[tuple[str, ActMem | None]] = [(PLAIN, None)]
    cases += [(f"{width} bits", ActMem({**settings, "bits": width})) for width in bits]
    for name, actmem in cases:
        found = probe(actmem)
        assert found.traced is not None
        target = target or found.batch_size
        methods.append(_method(name, found.traced, target, budget_bytes))
        _add_layers(layers, name, found.traced, target)
    if checkpointed:
        with _checkpointing(model, checkpointed):
            found = probe(None)
        assert found.traced is not None
        methods.append(_method(CHECKPOINT, found.traced, target, budget_bytes))
    return MemoryPlan(target, budget_bytes, (trace[0], trace[1]), tuple(methods), tuple(layers.values()))


def _probe(
    model: LightningModule,
    datamodule: LightningDataModule | None,
    trace: Sequence[int],
    batch_arg_name: str,
    accelerator: str,
    actmem: ActMem | None,
) -> _Probe:
    probe = _Probe(trace, batch_arg_name, None if actmem is None else actmem.engine)
    with isolate_rng(), silent_lightning(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(GPU|MPS) available but not used.*")
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            callbacks=[probe] if actmem is None else [actmem, probe],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            max_steps=0,
        )
        trainer.fit(model, datamodule=datamodule)
    return probe


def _method(name: str, traced: _Traced, batch_size: int, budget_bytes: int | None) -> MethodPlan:
    line = Line.through(*traced.trials)
    stored = raw = None
    if traced.reports:
        first, second = traced.reports
        stored = _at(batch_size, traced, first.saved_bytes, second.saved_bytes)
        raw = _at(batch_size, traced, first.raw_bytes, second.raw_bytes)
    return MethodPlan(
        name,
        round(line.fixed_bytes),
        line.bytes_per_sample,
        stored,
        raw,
        line.peak_bytes(batch_size),
        None if budget_bytes is None else line.largest(budget_bytes),
    )


def _add_layers(layers: dict[tuple[str, str], LayerPlan], name: str, traced: _Traced, batch_size: int) -> None:
    if not traced.reports:
        return
    sums: dict[tuple[str, str], list[list[int]]] = {}
    for index, report in enumerate(traced.reports):
        for row in report.rows:
            if row.kind not in BORROWED:
                counts = sums.setdefault((row.layer, row.kind), [[0, 0], [0, 0]])[index]
                counts[0] += row.raw_bytes
                counts[1] += row.saved_bytes
    for key, ((raw_first, saved_first), (raw_second, saved_second)) in sums.items():
        layer = layers.setdefault(key, LayerPlan(*key, _at(batch_size, traced, raw_first, raw_second), {}))
        layer.saved_bytes[name] = _at(batch_size, traced, saved_first, saved_second)


def _at(batch_size: int, traced: _Traced, first: int, second: int) -> int:
    """Continue the line through two figures, in whole numbers: exact for what is exactly linear."""
    small, large = (trial.batch_size for trial in traced.trials)
    return first + (second - first) * (batch_size - small) // (large - small)


@contextmanager
def _checkpointing(model: LightningModule, patterns: Sequence[str]) -> Iterator[None]:
    """Run the submodules that match inside ``torch.utils.checkpoint``."""
    matched = {
        name: module for name, module in model.named_modules() if any(fnmatch.fnmatch(name, p) for p in patterns)
    }
    if not matched:
        raise ValueError(f"checkpointed must match submodules of the model, got {list(patterns)}: none matches.")
    shadowed = [module for module in matched.values() if "forward" not in vars(module)]
    for module in shadowed:
        vars(module)["forward"] = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in shadowed:
            del vars(module)["forward"]
