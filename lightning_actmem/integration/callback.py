"""`ActMem`: the callback that compresses activations under any stock strategy."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..config import ActMemConfig, given_settings
from ..engine import ActMemEngine
from .adaptation import Adaptation
from .figures import log_figures
from .metrics import StepMetrics
from .shadow import CompressedTrainingStep
from .summary import TITLE, changes_text, prints, render, show, summarize, wants_summary

# What a callback or strategy takes for `config`. In this order jsonargparse hands over what was written, no more:
# with ActMemConfig before Mapping, a value that it refuses would come back as text and be taken for a file name.
ConfigArgument = str | Mapping[str, Any] | ActMemConfig | os.PathLike[str] | None


class ActMem(Callback):
    """Trains with compressed activations: packs what autograd saves in ``training_step``, under any stock strategy.

    The model needs no change, nothing but ``training_step`` is touched, and nothing is left behind after the run.
    Together with `ActMemStrategy` or `ActMemDDPStrategy` both use one engine: what is given here wins over what is
    given there. Which one that is (``engine``) is settled when a run begins.

    Args:
        config: An `ActMemConfig`, a mapping, an OmegaConf node or the path of a YAML file.
        bits: As in `ActMemConfig`, like all that follow; they win over ``config``, and ``None`` means "as there".
        codec: ``"auto"``, ``"measured"``, ``"uniform"``, ``"rotated"``, ``"bfp"``, ``"fp8_e4m3"``, ``"fp8_e5m2"`` or
            ``"identity"``.
        group_size: Consecutive elements that share one minimum and step.
        rounding: ``"dither"``, ``"stochastic"`` or ``"nearest"``.
        seed: Seed of the rounding noise.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        derive: Whether to compute again, instead of storing, what follows from a stored tensor.
        activations: ``"derive"``, ``"derivative"`` or ``"inverted"``: what element-wise operations keep.
        attention_bits: Least bits for what attention multiplies.
        loss_bits: Least bits for what a loss saves.
        layer_bits: Bits of layers that have their own, by pattern.
        layer_activations: What element-wise operations keep instead of ``activations``, by pattern.
        exact: Patterns of layers or operations that stay exact.
        min_elements: Tensors with fewer elements than this stay as they are.
        adapt: Whether the bits of every site follow from what its rounding does to the gradient.
        noise: Variance that rounding may add to the gradient, relative to the minibatch gradient's own.
        budget: Activation bytes to store at most (``"4GiB"``).
        adapt_every: Training batches between two adaptations; 0: once an epoch.
        method: ``"actmem"``, ``"actnn"`` or ``"gact"``.
        offload: Whether packed tensors move to the host, or the bytes that stay on the device (``"2GiB"``).
        summary: Print the per-layer table after the first training step, where Lightning prints its model summary.
        verbose: Print at every adaptation what changes and why, and the table again.
        **fields: No others; a misspelled one is refused with the right name.

    Raises:
        ValueError: If a setting is unknown or not allowed.
        TypeError: If a setting has the wrong type.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=ActMem(bits=4), accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        config: ConfigArgument = None,
        *,
        bits: int | None = None,
        codec: str | None = None,
        group_size: int | None = None,
        rounding: str | None = None,
        seed: int | None = None,
        backend: str | None = None,
        derive: bool | None = None,
        activations: str | None = None,
        attention_bits: int | None = None,
        loss_bits: int | None = None,
        layer_bits: dict[str, int] | None = None,
        layer_activations: dict[str, str] | None = None,
        exact: tuple[str, ...] | None = None,
        min_elements: int | None = None,
        adapt: bool | None = None,
        noise: float | None = None,
        budget: str | None = None,
        adapt_every: int | None = None,
        method: str | None = None,
        offload: bool | int | str | None = None,
        summary: bool | None = None,
        verbose: bool | None = None,
        **fields: Any,
    ) -> None:
        self.given = given_settings(
            config,
            bits=bits,
            codec=codec,
            group_size=group_size,
            rounding=rounding,
            seed=seed,
            backend=backend,
            derive=derive,
            activations=activations,
            attention_bits=attention_bits,
            loss_bits=loss_bits,
            layer_bits=layer_bits,
            layer_activations=layer_activations,
            exact=exact,
            min_elements=min_elements,
            adapt=adapt,
            noise=noise,
            budget=budget,
            adapt_every=adapt_every,
            method=method,
            offload=offload,
            summary=summary,
            verbose=verbose,
            **fields,
        )
        self.engine = ActMemEngine(self.given)
        self.adaptation = Adaptation()
        self._compressed: CompressedTrainingStep | None = None
        self._metrics: StepMetrics | None = None
        self._title = ""
        self._stage = ""  # of the trainer that is at work

    @property
    def state_key(self) -> str:
        """``"ActMem"``, whatever the settings: a run begun with the callback resumes under the strategy."""
        return "ActMem"

    def paused(self) -> AbstractContextManager[None]:
        """Leave autograd alone inside this context, in the middle of a step: for ``torch.func`` and the like."""
        return self.engine.paused()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle which engine is used, and have ``training_step`` run compressed in ``fit``.

        Raises:
            ValueError: If another `ActMem` in this trainer has other settings.
            ActMemError: If the settings need another device than the trainer's.
        """
        self._stage = stage
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        first = next(callback for callback in callbacks if isinstance(callback, ActMem))
        if first is not self:
            self._follow(first)
            return
        self._share(getattr(trainer.strategy, "actmem", None))
        self.engine.rank = trainer.global_rank
        if stage == "fit":
            self.engine.check_device(trainer.strategy.root_device)
            self._stop()
            if self.adaptation.has_run:
                self._restart(getattr(trainer.strategy, "actmem", None))
            if any(map(_finds_batch_size, callbacks)):
                # The trials run without callbacks, so with the plan of now: the default.
                self.engine.plan = {}
                self.adaptation.capped = True
            self._compressed = CompressedTrainingStep(trainer.strategy, self.engine)
            self._metrics = None if trainer.barebones else StepMetrics(self.engine)
            self._title = TITLE if self.engine.config.summary and wants_summary(trainer) else ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Adapt the bits if it is time to."""
        if self._compressed is None:
            return
        record = self.adaptation.start_batch(trainer, self.engine, batch, batch_idx)
        if record is None:
            return
        if self._metrics is not None:
            self._metrics.keep(record.metrics())
            log_figures(trainer, self.adaptation.history)
        if self.engine.config.verbose and prints(trainer):
            show(trainer, changes_text(record))
            if record.changes:
                self._title = f"ActMem: what a training step has stored since step {record.step}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step's figures, and show the table after the first step."""
        if self._metrics is not None:
            self._metrics.log_step(trainer, pl_module)
        if self._title and self.engine.ledger.rows:
            show(trainer, render(summarize(self.engine.report(), self._title)))
            self._title = ""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's figures."""
        if self._metrics is not None:
            self._metrics.log_epoch(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind: `teardown` is not called after an exception or KeyboardInterrupt."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._release()

    # Lightning refuses two callbacks with the same state key wherever it sees `state_dict` overridden, and it looks
    # through `functools.wraps` for that. `setup` has the better rule and message: equal settings are harmless.
    @functools.wraps(Callback.state_dict, assigned=(), updated=())
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the engine's state and the adaptation's: plain numbers, loadable with ``weights_only=True``."""
        return {**self.engine.state_dict(), "adaptation": self.adaptation.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was taken; does nothing while the trainer validates, tests or predicts.

        Lightning restores callbacks there too: ``trainer.test(ckpt_path="best")`` at the end of a run would take back
        what the run has found since that checkpoint.
        """
        if self._stage not in ("", "fit"):
            return
        self.engine.load_state_dict(state_dict)
        if "adaptation" in state_dict:
            self.adaptation.load_state_dict(state_dict["adaptation"])

    def _share(self, partner: ActMem | None) -> None:
        """Use one engine and one adaptation together with the strategy: its settings where nothing is given here.

        Without one the settings are one's own again, whatever an earlier trainer's strategy has added to them.
        """
        theirs = {} if partner is None else partner.given
        config = ActMemConfig.load({**theirs, **self.given})
        if config != self.engine.config:
            self.engine = ActMemEngine(config)
        if partner is not None:
            partner.engine, partner.adaptation = self.engine, self.adaptation

    def _restart(self, partner: ActMem | None) -> None:
        """Adapt afresh: what an earlier run has found holds for its model and data."""
        capped = self.adaptation.capped  # a batch size that has been found may well be that of this run
        self.adaptation = Adaptation()
        self.adaptation.capped = capped
        self.engine.restart_adapter()
        if partner is not None:
            partner.adaptation = self.adaptation

    def _follow(self, first: ActMem) -> None:
        """Leave the work to the trainer's first `ActMem`."""
        mine, other = ActMemConfig.load(self.given), ActMemConfig.load(first.given)
        if mine != other:
            raise ValueError(
                f"one Trainer can have one ActMem, got two with different settings: {other} and {mine}. Remove one of "
                "them, or give both the same settings. To override a strategy's settings one callback is enough."
            )
        self.engine, self.adaptation = first.engine, first.adaptation

    def _stop(self) -> None:
        if self._compressed is not None:
            self._compressed.remove()
        self._compressed = None
        self._metrics = None
        self._title = ""

    def _release(self) -> None:
        self._stop()
        self._stage = ""
        self.engine.release()
        # Lightning hands every callback the model's bound `log` and `log_dict`, and with them the model.
        for name in ("log", "log_dict"):
            vars(self).pop(name, None)


def _finds_batch_size(callback: Callback) -> bool:
    """Whether this is a batch-size finder, Lightning's or another, under whatever package name."""
    return any(parent.__name__.endswith("BatchSizeFinder") for parent in type(callback).__mro__)
