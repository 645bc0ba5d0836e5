"""What trial steps may change, and how each of it is put back: context managers around the trials."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core import rank_zero as rank_zero_module
from torch import Generator, nn
from torchmetrics import Metric


@contextmanager
def kept_checkpoint(trainer: Trainer) -> Iterator[None]:
    """Restore what a checkpoint holds; a run that is being resumed goes on being resumed."""
    connector = trainer._checkpoint_connector
    pending, path = connector._loaded_checkpoint, connector._ckpt_path
    # Each process has its own file: nothing is gathered, and no file system has to be shared.
    with tempfile.TemporaryDirectory(prefix="actmem_") as folder:
        file = Path(folder, "before.ckpt")
        torch.save(connector.dump_checkpoint(weights_only=False), file)
        try:
            yield
        finally:
            connector._loaded_checkpoint = torch.load(file, map_location="cpu", weights_only=False)
            connector.restore_datamodule()
            connector.restore_model()
            connector.restore_callbacks()
            connector.restore_training_state()
            connector._loaded_checkpoint, connector._ckpt_path = pending, path


@contextmanager
def kept_module_state(model: LightningModule) -> Iterator[None]:
    """Restore what no checkpoint holds: metrics, buffers that are not persistent, gradients, training mode."""
    metrics = {id(m): {k: deepcopy(v) for k, v in vars(m).items() if k in _state_of(m)} for m in _metrics(model)}
    buffers = [(buffer, buffer.detach().clone()) for buffer in _other_buffers(model)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for metric in _metrics(model):
            vars(metric).update(metrics[id(metric)])
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


@contextmanager
def kept_containers(model: LightningModule) -> Iterator[None]:
    """Restore the lists, dicts and sets that the user's class has as attributes; what they contain stays as it is."""
    own = {name: value for name, value in vars(model).items() if name not in _lightning_attributes()}
    kept = {name: (value, value.copy()) for name, value in own.items() if type(value) in (list, dict, set)}
    try:
        yield
    finally:
        for name, (value, content) in kept.items():
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
            vars(model)[name] = value


def _lightning_attributes() -> set[str]:
    """The attributes that every module has: Lightning and PyTorch look after them."""
    return set(vars(LightningModule()))


@contextmanager
def kept_generators(owners: Iterable[Any]) -> Iterator[None]:
    """Restore the states of the random generators that are attributes of modules, data or samplers."""
    generators = [v for owner in owners for v in getattr(owner, "__dict__", {}).values() if isinstance(v, Generator)]
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _metrics(model: nn.Module) -> list[Metric]:
    return [module for module in model.modules() if isinstance(module, Metric)]


def _state_of(metric: Metric) -> set[str]:
    return {*metric._defaults, "_update_count", "_computed", "_is_synced", "_cache"}


def _other_buffers(model: nn.Module) -> list[torch.Tensor]:
    saved = {value.data_ptr() for value in model.state_dict().values() if isinstance(value, torch.Tensor)}
    return [buffer for buffer in model.buffers() if buffer.data_ptr() not in saved]


@contextmanager
def kept_loop(trainer: Trainer) -> Iterator[None]:
    """Restore the limits, progress and results of the fit loop."""
    loop = trainer.fit_loop
    limits = loop.epoch_loop.max_steps, loop.max_epochs
    batches = trainer.limit_train_batches, trainer.limit_val_batches, trainer.should_stop
    state = deepcopy(loop.state_dict())
    trainer.limit_train_batches, trainer.limit_val_batches = 1.0, 0
    try:
        yield
    finally:
        loop.epoch_loop.max_steps, loop.max_epochs = limits
        trainer.limit_train_batches, trainer.limit_val_batches, trainer.should_stop = batches
        loop.load_state_dict(state)
        loop.restarting = False
        forget_data(trainer)  # the run builds it again, and draws from the random generators when it always did
        trainer._logger_connector.reset_results()
        trainer._logger_connector.reset_metrics()


def forget_data(trainer: Trainer) -> None:
    """Let go of the dataloaders: they are built again from the model or datamodule when they are needed."""
    loop = trainer.fit_loop
    loop._data_fetcher = None  # it holds a batch
    loop._combined_loader = None
    loop.epoch_loop.val_loop._combined_loader = None


@contextmanager
def quiet_trainer(trainer: Trainer) -> Iterator[None]:
    """Take loggers and callbacks away, and learning-rate schedules, which may wait for a metric that never comes."""
    loggers, callbacks = trainer.loggers, trainer.callbacks  # type: ignore[attr-defined]
    configs = trainer.strategy.lr_scheduler_configs
    trainer.loggers = [DummyLogger()] if loggers else []
    trainer.callbacks = []  # type: ignore[attr-defined]
    if trainer.lightning_module.automatic_optimization:
        trainer.strategy.lr_scheduler_configs = []
    try:
        yield
    finally:
        trainer.loggers, trainer.callbacks = loggers, callbacks  # type: ignore[attr-defined]
        trainer.strategy.lr_scheduler_configs = configs


@contextmanager
def silent_lightning() -> Iterator[None]:
    """Keep Lightning from reporting the end of every trial as the end of training."""
    # Whichever of Lightning's two packages was imported last has put its own logger there.
    log: logging.Logger = rank_zero_module.log
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
