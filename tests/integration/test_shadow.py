"""What the layer hooks into a strategy, and that all of it is gone after every way out of a run."""

from __future__ import annotations

import gc
import signal
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner

from lightning_actmem import ActMem, ActMemEngine, ActMemError, ActMemStrategy
from lightning_actmem.integration.shadow import CompressedTrainingStep
from tests.integration.support import PACK_ALL, IteratorNet, Net, fit, is_untouched, new_trainer

WAYS_IN = {"callback": lambda: {"callbacks": [ActMem(**PACK_ALL)]}, "strategy": lambda: {"strategy": ActMemStrategy()}}


class FailingNet(Net):
    """Raises in its second training step."""

    error: BaseException = RuntimeError("no luck")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if len(self.seen) == 2:
            raise self.error
        return loss


class FailingSetup(Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        assert "training_step" in vars(trainer.strategy)  # the shadow is there, and `teardown` will not be called
        raise RuntimeError("no luck")


class SkippingNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)


class GradNet(Net):
    """Uses ``torch.func`` in the middle of its step."""

    pause: Any = None

    def penalty(self) -> Any:
        return torch.func.grad(lambda weight: weight.square().sum())(self.net[0].weight).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.pause is None:
            return super().training_step(batch, batch_idx) + self.penalty()
        with self.pause():
            self.note("paused")
            penalty = self.penalty()
        return super().training_step(batch, batch_idx) + penalty


@pytest.fixture
def _sigint():
    """Lightning ignores Ctrl+C from the first KeyboardInterrupt on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("way", WAYS_IN)
def test_only_the_training_step_is_compressed_and_nothing_is_left(way):
    model = Net()
    trainer = fit(model, **WAYS_IN[way](), limit_val_batches=1, val_check_interval=1, num_sanity_val_steps=1)
    assert is_untouched(trainer)
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(model)
    assert ("train", True) in model.seen
    assert {step for step, _ in model.seen} == {"train", "validate", "test", "predict"}
    assert all(active == (step == "train") for step, active in model.seen)
    assert is_untouched(trainer)


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_second_fit_is_compressed_as_well(way):
    model = Net()
    trainer = fit(model, **WAYS_IN[way]())
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(model)
    assert model.seen == [("train", True)] * 5
    assert is_untouched(trainer)


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_raising_step_leaves_nothing(way):
    trainer = new_trainer(**WAYS_IN[way]())
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.fit(FailingNet())
    assert is_untouched(trainer)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("way", WAYS_IN)
def test_a_keyboard_interrupt_leaves_nothing(way):
    model = FailingNet()
    model.error = KeyboardInterrupt()
    trainer = new_trainer(**WAYS_IN[way]())
    with pytest.raises(SystemExit):
        trainer.fit(model)
    assert trainer.interrupted
    assert is_untouched(trainer)


def test_an_exception_in_a_later_setup_leaves_nothing():
    trainer = new_trainer(callbacks=[ActMem(), FailingSetup()])
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.fit(Net())
    assert is_untouched(trainer)


# Lightning restores the trial's checkpoint before it has the callbacks back, and misses theirs.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.parametrize("way", WAYS_IN)
def test_a_failing_trial_of_a_tuner_leaves_nothing(tmp_path, way):
    """A tuner takes the callbacks away for its trials: their ``on_exception`` is never called."""
    trainer = new_trainer(**WAYS_IN[way](), default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="no luck"):
        Tuner(trainer).lr_find(FailingNet(), num_training=5)
    assert is_untouched(trainer)


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_step_that_returns_none_is_skipped(way):
    model = SkippingNet()
    trainer = fit(model, **WAYS_IN[way](), max_steps=-1, max_epochs=1, limit_train_batches=3)
    assert model.seen == [("train", True)] * 3
    assert is_untouched(trainer)


def test_the_model_dies_while_the_callback_lives():
    actmem = ActMem(**PACK_ALL)
    trainer = fit(callbacks=actmem)
    model = weakref.ref(trainer.lightning_module)
    assert actmem.engine.step == 3
    del trainer
    gc.collect()
    assert model() is None


def test_a_batch_that_the_step_fetches_itself_is_not_packed():
    actmem = ActMem(**PACK_ALL)
    fit(IteratorNet(), callbacks=actmem)
    assert actmem.engine.report().bytes_by_kind["input"][0] > 0


@pytest.mark.parametrize("way", WAYS_IN)
def test_torch_func_in_the_step_needs_a_pause(way):
    arguments = WAYS_IN[way]()
    model = GradNet()
    with pytest.raises(ActMemError, match=r"torch\.func transforms .* paused\(\)"):
        fit(model, **arguments)
    model.seen.clear()
    arguments = WAYS_IN[way]()
    model.pause = arguments["callbacks"][0].paused if way == "callback" else arguments["strategy"].paused
    fit(model, **arguments)
    assert model.seen == [("paused", False), ("train", True)] * 3


def strategy_that_counts() -> tuple[Any, list[str]]:
    calls: list[str] = []
    strategy = SingleDeviceStrategy()
    strategy.training_step = lambda *_: calls.append("step")  # type: ignore[method-assign]
    strategy.teardown = lambda: calls.append("teardown")  # type: ignore[method-assign]
    strategy._lightning_module = Net()
    return strategy, calls


def test_what_shadowed_the_step_before_comes_back():
    strategy, calls = strategy_that_counts()
    before = dict(vars(strategy))
    engine = ActMemEngine()
    CompressedTrainingStep(strategy, engine)
    strategy.training_step()
    assert engine.step == 1
    strategy.teardown()
    assert calls == ["step", "teardown"]
    assert dict(vars(strategy)) == before


def test_what_shadows_the_step_later_stays_and_runs_uncompressed():
    strategy, calls = strategy_that_counts()
    engine = ActMemEngine()
    compressed = CompressedTrainingStep(strategy, engine)
    ours = strategy.training_step

    def theirs() -> None:
        calls.append("theirs")
        ours()

    strategy.training_step = theirs
    compressed.remove()
    compressed.remove()
    strategy.training_step()
    assert strategy.training_step is theirs
    assert calls == ["theirs", "step"]
    assert engine.step == 0
