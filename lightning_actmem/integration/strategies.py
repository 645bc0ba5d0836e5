"""The strategies: ``"actmem"`` for one device or several, ``"actmem_ddp"`` for DDP with its own arguments."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from ..engine import ActMemEngine
from .callback import ActMem, ConfigArgument

_DDP_ARGUMENTS = {*signature(DDPStrategy).parameters, *signature(DistributedDataParallel).parameters} - {"kwargs"}


class _ActMemMixin(Strategy):
    """What both strategies add to their base: they bring an `ActMem` callback along, which does the work."""

    actmem: ActMem

    @property
    def engine(self) -> ActMemEngine:
        """The engine; the same as that of an `ActMem` callback in the trainer, once a run has begun."""
        return self.actmem.engine

    def paused(self) -> AbstractContextManager[None]:
        """Leave autograd alone inside this context, in the middle of a step: for ``torch.func`` and the like."""
        return self.actmem.paused()

    def connect(self, model: LightningModule) -> None:
        """Connect the model, and bring the callback into the trainer unless there is one."""
        super().connect(model)
        callbacks: list[Callback] = model.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, ActMem) for callback in callbacks):
            checkpoints = (index for index, callback in enumerate(callbacks) if isinstance(callback, Checkpoint))
            callbacks.insert(next(checkpoints, len(callbacks)), self.actmem)  # checkpoints have to stay last


class ActMemStrategy(_ActMemMixin, SingleDeviceStrategy):
    """Trains with compressed activations on whatever device the Trainer has; on several it becomes `ActMemDDPStrategy`.

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
        device: The device; ``None`` takes it from the Trainer.
        accelerator: As for Lightning's strategies.
        checkpoint_io: As for Lightning's strategies.
        precision_plugin: As for Lightning's strategies.
        **fields: No others; a misspelled one is refused with the right name.

    Raises:
        ValueError: If a setting is unknown or not allowed.
        TypeError: If a setting has the wrong type.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy="actmem", accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> trainer.strategy.engine.config.bits
        4
    """

    strategy_name = "actmem"  # without "ddp": Lightning refuses names that have it on MPS

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
        device: torch.device | str | int | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(
            device="cpu" if device is None else device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.actmem = ActMem(
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
        # Lightning's connector sets these four on a strategy that has them, and on no other: a strategy chosen by
        # its name is built without a device, and without `parallel_devices` it would train on the CPU.
        self._parallel_devices = None if device is None else [self.root_device]
        self.cluster_environment: ClusterEnvironment | None = None
        self.num_nodes = 1
        self._layer_sync: LayerSync | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The Trainer's devices; several of them only before the strategy becomes `ActMemDDPStrategy`."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = devices
        if devices:
            self._root_device = devices[0]

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register the strategy under its name."""
        strategy_registry.register(cls.strategy_name, cls, "Compressed activations", override=True)

    def _configure_launcher(self) -> None:
        """Become DDP on several devices: the last that the connector calls, when all of them are known."""
        if self.num_nodes > 1 or len(self._parallel_devices or ()) > 1:
            self._become_ddp()

    def _become_ddp(self) -> None:
        """Turn this object, which the connector keeps, into what it would have built for ``"actmem_ddp"``."""
        given = dict(vars(self))
        vars(self).clear()
        # A subclass of DDPStrategy from the start would not do: with one device Lightning would take it for
        # distributed, refuse the batch-size finder and change the sampler.
        self.__class__ = ActMemDDPStrategy  # type: ignore[assignment]
        DDPStrategy.__init__(
            self,  # type: ignore[arg-type]
            accelerator=given["_accelerator"],
            parallel_devices=given["_parallel_devices"],
            cluster_environment=given["cluster_environment"],
            checkpoint_io=given["_checkpoint_io"],
            precision_plugin=given["_precision_plugin"],
            start_method="fork" if _is_interactive() else "popen",
        )
        self.actmem = given["actmem"]
        self.num_nodes = given["num_nodes"]
        self._layer_sync = given["_layer_sync"]
        self.set_world_ranks()  # type: ignore[attr-defined]
        self._configure_launcher()


class ActMemDDPStrategy(_ActMemMixin, DDPStrategy):
    """Trains with compressed activations under ``DistributedDataParallel``; every process draws its own noise.

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
        **ddp_arguments: Those of Lightning's ``DDPStrategy`` and of ``DistributedDataParallel``, no others.

    Raises:
        ValueError: If a setting is unknown or not allowed.
        TypeError: If a setting has the wrong type.
    """

    strategy_name = "actmem_ddp"

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
        **ddp_arguments: Any,
    ) -> None:
        unknown = {name: ddp_arguments.pop(name) for name in ddp_arguments.keys() - _DDP_ARGUMENTS}
        super().__init__(**ddp_arguments)
        self.actmem = ActMem(
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
            **unknown,  # refused, with the right name: DDP itself would only notice when the processes run
        )

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register the strategy under its name."""
        strategy_registry.register(cls.strategy_name, cls, "Compressed activations with DDP", override=True)


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


ActMemStrategy.register_strategies(StrategyRegistry)
ActMemDDPStrategy.register_strategies(StrategyRegistry)
