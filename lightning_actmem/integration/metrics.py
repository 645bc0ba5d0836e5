"""The figures of every step and epoch, by way of ``pl_module.log``: loggers, progress bar and ``callback_metrics``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..engine import ActMemEngine

PROGRESS_BAR_METRIC = "actmem/ratio"


class StepMetrics:
    """Logs what each step has stored, and the mean over the epoch under the same names with ``_epoch`` at the end.

    A step's figures are handed to Lightning only when it is about to write them (``log_every_n_steps``) and at the
    first step of each epoch: five calls of ``log`` cost more than finding out the figures. The mean is over all steps.

    Under DDP each process logs its own figures, so loggers and progress bar show those of rank zero, as Lightning
    does with every step value that is not synchronised.

    Args:
        engine: What the steps are compressed by.
    """

    def __init__(self, engine: ActMemEngine) -> None:
        self._engine = engine
        self._step = engine.step
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._kept: dict[str, float] = {}

    def keep(self, figures: Mapping[str, float]) -> None:
        """Take an adaptation's figures; they are logged once, with the next step that Lightning writes."""
        self._kept = dict(figures)

    def log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the last step's figures; call it in ``on_train_batch_end``.

        With several closures in one batch (LBFGS) these are the last one's.
        """
        if self._engine.step == self._step:
            return  # no training_step has run compressed since the last time
        self._step = self._engine.step
        figures = self._engine.report(table=False).metrics()
        self._sums = {name: self._sums.get(name, 0.0) + figure for name, figure in figures.items()}
        self._steps += 1
        if self._steps == 1 or trainer._logger_connector.should_update_logs:
            for name, figure in figures.items():
                pl_module.log(
                    name,
                    _exact(figure),
                    on_step=True,
                    on_epoch=False,
                    prog_bar=name == PROGRESS_BAR_METRIC,
                    batch_size=1,
                )
        if self._kept and trainer._logger_connector.should_update_logs:
            self._log_kept(pl_module, on_step=True)

    def log_epoch(self, pl_module: LightningModule) -> None:
        """Log the means over the epoch's steps; call it in ``on_train_epoch_end``.

        They start again here and not at the epoch's start, which a run resumed in the middle of one does not see.
        """
        if self._kept:
            self._log_kept(pl_module, on_step=False)
        steps, self._steps = self._steps, 0
        sums, self._sums = self._sums, {}
        for name, total in sums.items():
            # Both flags together: no synchronisation (NCCL has none for a tensor on the CPU), and no warning about it.
            pl_module.log(
                f"{name}_epoch",
                _exact(total / steps),
                on_step=False,
                on_epoch=True,
                batch_size=1,
                sync_dist=True,
                rank_zero_only=True,
            )

    def _log_kept(self, pl_module: LightningModule, *, on_step: bool) -> None:
        kept, self._kept = self._kept, {}
        pl_module.log_dict(
            {name: _exact(figure) for name, figure in kept.items()},
            on_step=on_step,
            on_epoch=not on_step,
            batch_size=1,
            sync_dist=not on_step,
            rank_zero_only=not on_step,
        )


def _exact(figure: float) -> Tensor:
    """Return a float64 on the CPU: float32 has no exact byte counts from 16 MiB on, and MPS has no float64."""
    return torch.tensor(figure, dtype=torch.float64, device="cpu")
