"""The strategies: their names, the device they end up on, and what ``actmem`` turns into on several devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from lightning_actmem import ActMem, ActMemConfig, ActMemDDPStrategy, ActMemStrategy
from lightning_actmem.integration import strategies
from tests.integration.support import PACK_ALL, assert_bit_equal, fit, new_trainer


@pytest.fixture
def _two_gpus(monkeypatch):
    """Lets Lightning's connector believe in two GPUs: it looks at nothing but this accelerator."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: False))
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: 2))
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", staticmethod(_parse_devices))


def _parse_devices(devices: Any) -> list[int]:
    return list(range(devices)) if isinstance(devices, int) else [int(device) for device in devices]


def trainer_with(strategy: Any, **arguments: Any) -> Trainer:
    return new_trainer(strategy=strategy, **arguments)


def test_the_names_are_registered():
    assert StrategyRegistry["actmem"]["strategy"] is ActMemStrategy
    assert StrategyRegistry["actmem_ddp"]["strategy"] is ActMemDDPStrategy
    assert "ddp" not in ActMemStrategy.strategy_name  # Lightning refuses such a name on MPS


def test_one_device_stays_a_single_device_strategy():
    trainer = trainer_with("actmem")
    assert type(trainer.strategy) is ActMemStrategy
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    assert not isinstance(trainer.strategy, DDPStrategy)
    assert not trainer._accelerator_connector.is_distributed
    assert trainer.strategy.root_device == torch.device("cpu")
    assert trainer.strategy.launcher is None


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize(("devices", "index"), [(1, 0), ([1], 1)])
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_strategy_chosen_by_name_runs_on_the_trainers_gpu(accelerator, devices, index):
    """A plain subclass of SingleDeviceStrategy would silently train on the CPU here."""
    trainer = trainer_with("actmem", accelerator=accelerator, devices=devices)
    assert type(trainer.strategy) is ActMemStrategy
    assert trainer.strategy.root_device == torch.device("cuda", index)


def test_a_strategy_chosen_by_name_runs_on_mps(monkeypatch):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(MPSAccelerator, "parse_devices", staticmethod(lambda devices: [0]))
    monkeypatch.setattr(MPSAccelerator, "auto_device_count", staticmethod(lambda: 1))
    trainer = trainer_with("actmem", accelerator="gpu")
    assert type(trainer.strategy) is ActMemStrategy
    assert trainer.strategy.root_device == torch.device("mps", 0)
    with pytest.raises(ValueError, match="strategies from the DDP family are not supported on the MPS"):
        trainer_with("actmem_ddp", accelerator="gpu")


@pytest.mark.usefixtures("_two_gpus")
def test_a_device_that_was_asked_for_is_taken():
    trainer = trainer_with(ActMemStrategy(device="cuda:1"), accelerator="gpu")
    assert trainer.strategy.root_device == torch.device("cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(Exception, match=r"No supported gpu backend found|can not run on your system"):
        trainer_with("actmem", accelerator="gpu")


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize("arguments", [{"devices": 2}, {"devices": 1, "num_nodes": 2}, {"devices": "auto"}])
def test_several_devices_or_nodes_become_ddp(arguments):
    strategy = ActMemStrategy(bits=2, group_size=64)
    engine = strategy.engine
    trainer = trainer_with(strategy, accelerator="gpu", **arguments)
    assert trainer.strategy is strategy
    assert type(strategy) is ActMemDDPStrategy
    assert trainer._accelerator_connector.is_distributed
    assert trainer.world_size == 2
    assert strategy.engine is engine
    assert strategy.root_device == torch.device("cuda", 0)
    assert isinstance(strategy.launcher, _SubprocessScriptLauncher)


@pytest.mark.usefixtures("_two_gpus")
def test_everything_that_the_trainer_was_given_moves_along():
    checkpoint_io, environment = AsyncCheckpointIO(), LightningEnvironment()
    actmem = trainer_with(
        "actmem",
        accelerator="gpu",
        devices=2,
        num_nodes=3,
        precision="bf16-mixed",
        sync_batchnorm=True,
        plugins=[checkpoint_io, environment],
    ).strategy
    ddp = trainer_with(
        "ddp",
        accelerator="gpu",
        devices=2,
        num_nodes=3,
        precision="bf16-mixed",
        sync_batchnorm=True,
        plugins=[checkpoint_io, environment],
    ).strategy
    assert isinstance(actmem.accelerator, CUDAAccelerator)
    assert isinstance(actmem.precision_plugin, MixedPrecision)
    assert isinstance(actmem._layer_sync, TorchSyncBatchNorm)
    assert actmem.checkpoint_io is checkpoint_io
    assert actmem.cluster_environment is environment
    assert (actmem.num_nodes, actmem.world_size) == (ddp.num_nodes, ddp.world_size) == (3, 6)
    assert vars(actmem).keys() - {"actmem"} == vars(ddp).keys()


def test_a_notebook_gets_processes_by_fork(monkeypatch):
    monkeypatch.setattr(strategies, "_is_interactive", lambda: True)
    launcher = trainer_with("actmem", devices=2).strategy.launcher
    assert isinstance(launcher, _MultiProcessingLauncher)
    assert launcher.is_interactive_compatible


def test_the_base_strategies_own_arguments_are_passed_on():
    single = ActMemStrategy(bits=2, accelerator=CPUAccelerator(), precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
    trainer = trainer_with(single, accelerator="auto")
    assert trainer.precision == "bf16-mixed"
    ddp = ActMemDDPStrategy(bits=2, start_method="fork", find_unused_parameters=True)
    assert ddp._start_method == "fork"
    assert ddp._ddp_kwargs == {"find_unused_parameters": True}
    assert ddp.engine.config == ActMemConfig(bits=2)


def test_strategy_and_callback_train_alike():
    with_strategy = fit(strategy=ActMemStrategy(bits=2, **PACK_ALL))
    with_callback = fit(callbacks=ActMem(bits=2, **PACK_ALL))
    assert_bit_equal(with_strategy.lightning_module, with_callback.lightning_module)
