"""The callback's settings, its state, and how it gets on with a second one and with a strategy."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector
from omegaconf import OmegaConf

from lightning_actmem import ActMem, ActMemConfig, ActMemDDPStrategy, ActMemStrategy
from tests.integration.support import CLASSES, FEATURES, PACK_ALL, Net, assert_bit_equal, fit, new_trainer

ACCEPTED = {
    "keyword": lambda: ActMem(bits=2, seed=5),
    "config": lambda: ActMem(ActMemConfig(bits=2, seed=5)),
    "mapping": lambda: ActMem({"bits": 2, "seed": 5}),
    "omegaconf": lambda: ActMem(OmegaConf.create({"bits": "${seed}", "seed": 2}), seed=5),
    "both": lambda: ActMem({"bits": 8, "seed": 5}, bits=2),
    "strategy": lambda: ActMemStrategy({"bits": 2}, seed=5),
    "ddp": lambda: ActMemDDPStrategy({"seed": 5}, bits=2, find_unused_parameters=True),
}
REFUSED = {
    "bits must be one of 1, 2, 3, 4, 8, 32, got 5": lambda: ActMem(bits=5),
    "unknown ActMem setting 'bit'. Did you mean 'bits'": lambda: ActMem(bit=4),
    "unknown ActMem setting 'group'": lambda: ActMemStrategy({"group": 64}),
    "codec must be one of .*, got 'zip'": lambda: ActMemDDPStrategy(codec="zip"),
    "unknown ActMem setting 'bitz'. Did you mean 'bits'": lambda: ActMemDDPStrategy(bitz=4, static_graph=True),
}


class ConfiguringNet(Net):
    """Brings its own callback."""

    def configure_callbacks(self) -> Any:
        return [ActMem(bits=2, **PACK_ALL)]


class ResumableNet(Net):
    """Has the same batch and dropout masks in a step whether or not the run was resumed: Lightning saves neither."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.manual_seed(self.global_step)
        return super().training_step([torch.randn(8, FEATURES), torch.randint(CLASSES, (8,))], batch_idx)


class CountingNet(Net):
    """Counts how often autograd's hooks are on the stack at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(("depth", _hook_depth()))
        return super().training_step(batch, batch_idx)


def _hook_depth() -> int:
    autograd = torch._C._autograd
    pairs = []
    while (pair := autograd._top_saved_tensors_default_hooks(True)) is not None:
        autograd._pop_saved_tensors_default_hooks()
        pairs.append(pair)
    for pair in reversed(pairs):
        autograd._push_saved_tensors_default_hooks(*pair)
    return len(pairs)


@pytest.mark.parametrize("how", ACCEPTED)
def test_settings_come_as_keywords_configuration_or_mapping(how):
    assert ACCEPTED[how]().engine.config == ActMemConfig(bits=2, seed=5)


def test_settings_come_from_a_yaml_file(tmp_path):
    path = tmp_path / "actmem.yaml"
    path.write_text("bits: 2\nseed: 5\n")
    assert ActMem(path).engine.config == ActMem(str(path)).engine.config == ActMemConfig(bits=2, seed=5)


@pytest.mark.parametrize("message", REFUSED)
def test_bad_settings_are_refused_at_once(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize("owner", [ActMem, ActMemStrategy, ActMemDDPStrategy])
def test_every_setting_is_a_keyword(owner):
    """The command line and the editor see real parameters; they must follow the configuration."""
    parameters = inspect.signature(owner).parameters
    hints = get_type_hints(owner.__init__)
    names = [field.name for field in dataclasses.fields(ActMemConfig)]
    assert list(parameters)[1 : 1 + len(names)] == names
    for name, hint in get_type_hints(ActMemConfig).items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is None
        assert hints[name] == hint | None


def test_strategy_and_callback_share_one_engine_and_pack_once():
    actmem = ActMem(bits=2)
    strategy = ActMemStrategy(bits=8, **PACK_ALL)
    model = CountingNet()
    trainer = fit(model, callbacks=actmem, strategy=strategy)
    assert strategy.engine is actmem.engine
    assert actmem.engine.config == ActMemConfig(bits=2, **PACK_ALL)  # what the callback was given wins
    assert actmem.engine.step == 3
    assert model.seen.count(("depth", 1)) == 3
    assert sum(isinstance(callback, ActMem) for callback in trainer.callbacks) == 1
    assert_bit_equal(model, fit(callbacks=ActMem(bits=2, **PACK_ALL)).lightning_module)


def test_the_shared_engine_survives_a_second_run():
    actmem, strategy = ActMem(bits=2), ActMemStrategy(**PACK_ALL)
    trainer = fit(callbacks=actmem, strategy=strategy)
    engine = actmem.engine
    trainer.validate(trainer.lightning_module, verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(trainer.lightning_module)
    assert actmem.engine is engine is strategy.engine
    assert engine.step == 5


def test_a_second_callback_with_other_settings_is_refused():
    trainer = new_trainer(callbacks=[ActMem(bits=2), ActMem(bits=8)])
    with pytest.raises(ValueError, match=r"one Trainer can have one ActMem, got two with different settings.*bits=2.*"):
        trainer.fit(Net())


def test_a_second_callback_with_the_same_settings_changes_nothing():
    first, second = ActMem(bits=2, **PACK_ALL), ActMem({"bits": 2, **PACK_ALL})
    trainer = fit(callbacks=[first, second])
    assert first.engine is second.engine
    assert first.engine.step == 3
    assert_bit_equal(trainer.lightning_module, fit(callbacks=ActMem(bits=2, **PACK_ALL)).lightning_module)


@pytest.mark.parametrize("strategy", ["auto", "actmem"])
def test_a_callback_of_the_model_counts_like_one_of_the_trainer(strategy):
    trainer = fit(ConfiguringNet(), strategy=strategy)
    (actmem,) = (callback for callback in trainer.callbacks if isinstance(callback, ActMem))
    assert actmem.engine.config == ActMemConfig(bits=2, **PACK_ALL)
    assert actmem.engine.step == 3
    assert strategy == "auto" or trainer.strategy.engine is actmem.engine


def test_the_strategy_keeps_checkpoint_callbacks_last(tmp_path):
    callbacks = [Callback(), ModelCheckpoint(tmp_path), Callback()]
    trainer = fit(callbacks=callbacks, strategy="actmem", enable_checkpointing=True)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds == [Callback, Callback, ActMem, ModelCheckpoint]
    assert trainer.callbacks == _CallbackConnector._reorder_callbacks(trainer.callbacks)


def test_the_rank_of_the_process_is_part_of_the_noise():
    actmem = ActMem()
    actmem.engine.rank = 7
    fit(callbacks=actmem)
    assert actmem.engine.rank == 0


def test_an_object_of_the_other_lightning_is_refused():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    trainer = pytorch_lightning.Trainer(
        callbacks=[ActMem()], accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1
    )
    with pytest.raises(TypeError, match=r"single import style|LightningModule"):
        trainer.fit(Net())


def save(path: Any, **arguments: Any) -> Trainer:
    trainer = fit(max_steps=3, **arguments)
    trainer.save_checkpoint(path)
    return trainer


def test_the_state_loads_with_weights_only(tmp_path):
    save(tmp_path / "last.ckpt", callbacks=ActMem(**PACK_ALL))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["ActMem"]["step"] == 3


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("resume_with", ["callback", "strategy"])
def test_a_resumed_run_goes_on_with_the_same_noise(tmp_path, resume_with):
    """Begun with the callback, resumed with either; the reference is one run without a break."""
    settings = {"bits": 2, **PACK_ALL}
    torch.manual_seed(0)
    whole, half, model = (ResumableNet() for _ in range(3))
    half.load_state_dict(whole.state_dict())
    fit(whole, callbacks=ActMem(settings), max_steps=8)
    fit(half, callbacks=ActMem(settings), max_steps=4).save_checkpoint(tmp_path / "half.ckpt")
    arguments = {"strategy": ActMemStrategy(settings)} if resume_with == "strategy" else {"callbacks": ActMem(settings)}
    trainer = new_trainer(max_steps=8, **arguments)
    trainer.fit(model, ckpt_path=tmp_path / "half.ckpt")
    (actmem,) = (callback for callback in trainer.callbacks if isinstance(callback, ActMem))
    assert actmem.engine.step == 8
    assert len(model.seen) == 4
    assert_bit_equal(model, whole)


def test_a_checkpoint_of_a_plain_run_starts_the_noise_anew(tmp_path):
    trainer = fit()
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    actmem = ActMem(**PACK_ALL)
    resumed = new_trainer(max_steps=5, callbacks=actmem)
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        resumed.fit(Net(), ckpt_path=tmp_path / "plain.ckpt")
    assert actmem.engine.step == 2


def test_settings_of_a_strategy_end_with_its_trainer() -> None:
    """The next trainer, with a strategy that has none, had them too."""
    actmem = ActMem(seed=3, **PACK_ALL)
    fit(strategy=ActMemStrategy(bits=2), callbacks=[actmem])
    assert (actmem.engine.config.bits, actmem.engine.config.seed) == (2, 3)
    fit(callbacks=[actmem])
    assert (actmem.engine.config.bits, actmem.engine.config.seed) == (4, 3)


@pytest.mark.parametrize("evaluate", ["test", "validate", "predict"])
def test_evaluating_a_checkpoint_takes_nothing_back(evaluate: str, tmp_path: Any) -> None:
    """Lightning restores callbacks there too: the run's state and history were those of the checkpoint afterwards."""
    actmem = ActMem(**PACK_ALL)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = fit(callbacks=[actmem, saving], enable_checkpointing=True, limit_predict_batches=1, limit_test_batches=1)
    state = actmem.state_dict()
    assert state["step"] == 3
    getattr(trainer, evaluate)(trainer.lightning_module, ckpt_path=tmp_path / "step=2.ckpt")
    assert actmem.state_dict() == state
    actmem.load_state_dict({**state, "step": 2})  # by hand, when no trainer is at work
    assert actmem.engine.step == 2
