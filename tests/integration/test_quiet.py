"""A quiet training step gives its loss and leaves the run, the model and every random generator as they were."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_actmem.integration.quiet import NoLossError, quiet, quiet_loss
from tests.integration.support import CLASSES, FEATURES, ManualNet, Net, assert_bit_equal, fit, weights

BATCH = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(5)), torch.arange(8) % CLASSES


class BusyNet(Net):
    """Does in its training step all that must not be seen outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(self.net[0].out_features))
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.accuracy = MetricCollection({"top1": MulticlassAccuracy(CLASSES), "again": MulticlassAccuracy(CLASSES)})
        self.mean = MeanMetric()
        self.outputs: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(2)
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        scores = self(x + 0 * torch.rand((), generator=self.generator))
        self.accuracy(scores, y)
        loss = nn.functional.cross_entropy(scores, y) + 0 * (random.random() + np.random.rand())
        self.mean.update(loss)
        self.steps += 1
        self.count += 1
        self.outputs.append(loss.detach())
        self.last_loss = loss
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"mean": self.mean, "steps": self.steps})
        if self.logger is not None:
            self.logger.experiment.log_metrics({"by hand": loss.item()})
        return {"loss": loss}


class At(Callback):
    """Does something at the start of one training batch."""

    def __init__(self, batch_idx: int, action: Callable[[Any, Any], object]) -> None:
        self.batch_idx = batch_idx
        self.action = action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            self.action(trainer, batch)


def losses(trainer: Any, batch: Any, times: int = 2) -> list[Tensor]:
    with quiet(trainer):
        found = [quiet_loss(trainer, batch, 0) for _ in range(times)]
        parameters = [parameter for parameter in trainer.lightning_module.parameters() if parameter.requires_grad]
        for loss in found:
            torch.autograd.grad(loss, parameters, allow_unused=True)
    return found


def tensors(result: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in vars(result).items() if isinstance(value, Tensor)}


def everything(trainer: Any) -> dict[str, Any]:
    """All that a run consists of, as far as it can be compared."""
    module = trainer.lightning_module
    states = {
        f"{name}.{state}": getattr(metric, state)
        for name, metric in module.named_modules()
        for state in (
            *getattr(metric, "_defaults", ()),
            *(s for s in ("_update_count", "_computed") if s in vars(metric)),
        )
    }
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "weights": weights(module),
        "buffers": {name: (id(buffer), buffer._version, buffer.clone()) for name, buffer in module.named_buffers()},
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in module.parameters()],
        "trainable": [p.requires_grad for p in module.parameters()],
        "metrics": {k: v.clone() if isinstance(v, Tensor) else v for k, v in states.items()},
        "random": (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.rand(1)),
        "own random": module.generator.get_state() if hasattr(module, "generator") else None,
        "attributes": {k: v.copy() if isinstance(v, list) else v for k, v in vars(module).items()},
        "results": {k: tensors(v) for k, v in trainer._results.items()},
        "callback metrics": dict(trainer.callback_metrics),
        "loops": trainer.fit_loop.state_dict(),
        "global step": trainer.global_step,
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "scaler": None if scaler is None else scaler.state_dict(),
        "loggers": [id(logger) for logger in trainer.loggers],
    }


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(actual[index], value, f"{where}[{index}]")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=lambda text: f"{where}: {text}")
    else:
        assert actual is expected or actual == expected, where


def compared(trainer: Any, batch: Any) -> None:
    state = torch.get_rng_state()
    before = everything(trainer)
    torch.set_rng_state(state)
    found = losses(trainer, batch)
    after = everything(trainer)
    assert_same(after, before)
    assert all(loss.requires_grad for loss in found)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}, {"logger": True}],
    ids=["plain", "accumulation", "bf16", "logger"],
)
def test_nothing_is_left_of_a_quiet_step(tmp_path, arguments):
    if "logger" in arguments:
        arguments = {"logger": [CSVLogger(tmp_path), CSVLogger(tmp_path)], "log_every_n_steps": 1}
    fit(BusyNet(), callbacks=At(2, compared), **arguments)


def test_a_run_with_quiet_steps_is_bit_equal_to_one_without():
    def trained(action: Callable[[Any, Any], object]) -> Any:
        torch.manual_seed(0)
        return fit(BusyNet(), callbacks=At(1, action)).lightning_module

    with_steps, without = trained(losses), trained(lambda *_: None)
    assert_bit_equal(with_steps, without)
    assert with_steps.outputs == without.outputs
    assert with_steps.trainer.callback_metrics == without.trainer.callback_metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_is_that_of_the_training_step(precision):
    """To the bit: the same dropout, the same autocast."""
    seen: list[Tensor] = []

    class Noting(BusyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            seen.append(output["loss"].detach().clone())
            return output

    first = At(0, lambda trainer, batch: seen.append(losses(trainer, batch, times=1)[0].detach()))
    fit(Noting(), callbacks=first, precision=precision, max_steps=1)
    quiet_one, returned, real = seen
    torch.testing.assert_close(quiet_one, real, rtol=0, atol=0)
    torch.testing.assert_close(returned, real, rtol=0, atol=0)


def test_several_quiet_steps_draw_noise_of_their_own():
    """Two losses of one batch differ by their dropout: its part in the gradient's variance has to be seen."""
    found: list[Tensor] = []
    fit(callbacks=At(1, lambda trainer, batch: found.extend(losses(trainer, batch))))
    assert found[0] != found[1]


class GanNet(ManualNet):
    """Toggles its optimizers, clears gradients, steps a scheduler and an optimizer, all by hand."""

    use_pl_optimizer = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=self.use_pl_optimizer):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
            self.lr_schedulers()[0].step()
            loss = self.loss(batch)
            try:
                self.manual_backward(loss)
            except Exception:
                pytest.fail("a user's `except Exception` caught what is none of its business")
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in optimizers]


@pytest.mark.parametrize("use_pl_optimizer", [True, False])
def test_manual_optimisation_ends_at_its_first_backward(use_pl_optimizer):
    model = GanNet()
    model.use_pl_optimizer = use_pl_optimizer
    fit(model, callbacks=At(2, compared), max_steps=-1, max_epochs=1, limit_train_batches=4)


class LoneNet(ManualNet):
    """Optimises by hand past Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (first, _) = self.optimizers()
        self.loss(batch).backward()
        first.step()


class NoneNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


@pytest.mark.parametrize("net", [LoneNet, NoneNet])
def test_no_loss_says_so_and_leaves_nothing(net):
    def compared_without_loss(trainer: Any, batch: Any) -> None:
        before = everything(trainer)
        torch.set_rng_state(before["random"][1])
        with pytest.raises(NoLossError, match="no loss"):
            losses(trainer, batch)
        assert_same(everything(trainer), before)

    fit(net(), callbacks=At(0, compared_without_loss), max_steps=2, max_epochs=1)


def test_an_error_in_the_step_leaves_nothing():
    class Failing(BusyNet):
        def forward(self, x: Tensor) -> Tensor:
            scores = super().forward(x)
            if len(x) == 3:
                raise RuntimeError("a batch of three")
            return scores

    def failing(trainer: Any, batch: Any) -> None:
        state = torch.get_rng_state()
        before = everything(trainer)
        torch.set_rng_state(state)
        with pytest.raises(RuntimeError, match="a batch of three"):
            losses(trainer, [part[:3] for part in batch])
        assert_same(everything(trainer), before)

    fit(Failing(), callbacks=At(2, failing))


def test_shared_buffers_stay_shared_inside_a_step():
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(2))
            self.net[1].register_buffer("same", self.table)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.table.add_(1)
            assert self.net[1].same is self.table
            return self.loss(batch)

    trainer = fit(Tied(), callbacks=At(1, losses))
    assert trainer.lightning_module.table.tolist() == [3, 3]
    assert trainer.lightning_module.net[1].same is trainer.lightning_module.table


class KeepingNet(Net):
    """Keeps what it has seen, in containers of every kind, and has generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.nested: dict[str, Any] = {"losses": [], "pair": ([0], 1)}
        self.by_name: defaultdict[str, list[float]] = defaultdict(list)
        self.ordered: OrderedDict[str, Tensor] = OrderedDict(seen=torch.zeros(()))
        self.last: deque[Any] = deque([[]], maxlen=3)
        self.memory = torch.zeros(())
        self.itself: list[Any] = []
        self.itself.append(self.itself)
        self.generators = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        value = loss.item()
        self.nested["losses"].append(value)
        self.nested["pair"][0][0] += 1
        self.by_name["loss"].append(value)
        self.ordered["seen"] += 1
        self.last[0].append(value)
        self.last.append([value])
        self.memory += 1
        self.itself[0].append(value)
        self.drawn = [generator.random() for generator in self.generators[::2]], self.generators[1].rand()
        return loss

    def kept(self) -> Any:
        names = "nested", "by_name", "ordered", "last", "memory", "drawn"
        return [getattr(self, name) for name in names], self.itself[1:]


class MomentumNet(Net):
    """Has an encoder without gradient, which follows in place or by assignment."""

    assign = False

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(FEATURES, 4).requires_grad_(False)
        self.tied = self.key

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for parameter in self.key.parameters():
            if self.assign:
                parameter.data = 0.9 * parameter.data + 0.1
            else:
                parameter.data.mul_(0.9).add_(0.1)
        assert self.tied.weight is self.key.weight
        return super().training_step(batch, batch_idx)

    def kept(self) -> Any:
        return [parameter.clone() for parameter in self.key.parameters()]


class AssigningNet(MomentumNet):
    assign = True


@pytest.mark.parametrize("net", [KeepingNet, MomentumNet, AssigningNet])
def test_what_a_module_keeps_is_that_of_real_steps_only(net):
    def kept(action: Callable[[Any, Any], object]) -> Any:
        torch.manual_seed(0)
        return fit(net(), callbacks=At(1, action)).lightning_module.kept()

    assert_same(kept(losses), kept(lambda *_: None))


def test_the_parameters_are_the_same_objects_afterwards():
    model = MomentumNet()
    before = list(map(id, model.parameters()))
    fit(model, callbacks=At(1, losses))
    assert list(map(id, model.parameters())) == before
    assert not any(parameter.requires_grad for parameter in model.key.parameters())
