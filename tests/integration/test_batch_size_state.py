"""`ActMemBatchSizeFinder`: what it leaves behind, which is nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_actmem import ActMem, ActMemBatchSizeFinder, plan
from tests.integration.sized_nets import Mlp, SizedNet
from tests.integration.support import (
    CLASSES,
    PACK_ALL,
    Net,
    assert_bit_equal,
    dataset,
    fit,
    is_untouched,
    new_trainer,
)


class StatefulNet(SizedNet):
    """With state that no checkpoint holds, and a schedule that waits for a metric."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.register_buffer("steps_seen", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes.append(len(batch[0]))
        self.accuracy.update(self(batch[0]), batch[1])
        self.steps_seen += 1
        self.log("accuracy", self.accuracy)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "never_logged"}}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(self.samples), batch_size=self.batch_size, shuffle=True)


def test_training_after_it_is_training_without_it():
    """Weights, optimizer, random streams, metrics, buffers, the engine's noise: as with the batch set by hand."""
    states = []
    for callbacks in ([ActMemBatchSizeFinder("1MiB", max_batch_size=64)], []):
        torch.manual_seed(0)
        model = StatefulNet(batch_size=8 if callbacks else 64)
        engine = ActMem(**PACK_ALL)
        trainer = new_trainer(callbacks=[engine, *callbacks], max_steps=5)
        torch.manual_seed(1)
        random.seed(1)
        trainer.fit(model)
        assert model.sizes[-5:] == [64] * 5
        assert is_untouched(trainer)
        assert (trainer.global_step, engine.engine.step, int(model.steps_seen)) == (5, 5, 5)
        states.append((model, torch.get_rng_state(), random.getstate(), trainer.optimizers[0].state_dict()))
    assert_bit_equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]
    torch.testing.assert_close(states[0][3], states[1][3], rtol=0, atol=0)


class DrawingData(LightningDataModule):
    """Draws from generators of its own: of the loader, of its sampler, and in ``train_dataloader`` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 8
        self.mine = torch.Generator().manual_seed(5)
        self.hidden = [torch.Generator().manual_seed(seed) for seed in (6, 7)]

    def train_dataloader(self) -> DataLoader[Any]:
        data = dataset(256 + int(torch.randint(0, 9, (), generator=self.mine)))
        sampler = RandomSampler(data, generator=self.hidden[0])
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler, generator=self.hidden[1])


class HoardingNet(Net):
    """Keeps what it sees in plain containers, one of which it builds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.by_batch: dict[int, int] = {-1: 0}
        self.sizes: set[int] = set()
        self.latest: list[int] = []
        self.hooks: list[str] = []

    def on_train_start(self) -> None:
        self.hooks.append("start")

    def on_train_end(self) -> None:
        self.hooks.append("end")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.by_batch[batch_idx] = len(batch[0])
        self.sizes.add(len(batch[0]))
        self.latest = [batch_idx]
        return loss


def test_plain_containers_have_nothing_of_the_trials():
    model = HoardingNet()
    losses, latest = model.losses, model.latest
    fit(model, callbacks=[ActMemBatchSizeFinder("1MiB", max_batch_size=16)], max_steps=2)
    assert model.losses is losses
    assert len(losses) == 2
    assert model.by_batch == {-1: 0, 0: 16, 1: 16}
    assert model.sizes == {16}
    assert latest == []
    assert model.latest == [1]
    assert model.hooks == ["start", "end"]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("index", [0, 1, 2], ids=["datamodule", "sampler", "loader"])
def test_own_generators_go_on_as_without_it(index):
    states = []
    for callbacks in ([ActMemBatchSizeFinder("1MiB", max_batch_size=8)], []):
        model, data = Net(), DrawingData()
        new_trainer(callbacks=callbacks, max_steps=2).fit(model, datamodule=data)
        states.append([data.mine, *data.hidden][index].get_state())
    assert torch.equal(*states)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_plan_draws_nothing_from_own_generators():
    data = DrawingData()
    before = [generator.get_state() for generator in (data.mine, *data.hidden)]
    plan(Net(), data, bits=(4,), trace=(8, 16))
    assert all(
        torch.equal(*pair) for pair in zip(before, (g.get_state() for g in (data.mine, *data.hidden)), strict=True)
    )


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_goes_on_being_resumed(tmp_path):
    checkpoint, again = (ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True) for _ in range(2))
    fit(SizedNet(), callbacks=[checkpoint], enable_checkpointing=True, max_steps=2)
    model, finder = SizedNet(), ActMemBatchSizeFinder("1MiB", max_batch_size=32)
    trainer = new_trainer(callbacks=[finder, again], enable_checkpointing=True, max_steps=5)
    trainer.fit(model, ckpt_path=checkpoint.last_model_path)
    assert trainer.global_step == 5
    assert model.sizes[-3:] == [32] * 3


@pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")
def test_the_found_batch_trains_with_bits_that_adapt_and_stores_no_more_than_its_trial():
    actmem = ActMem(**PACK_ALL, noise=0.2, adapt_every=3, summary=False)
    finder = ActMemBatchSizeFinder("1MiB", max_batch_size=128)
    model = Mlp()
    fit(model, callbacks=[actmem, finder], max_steps=8)
    assert model.sizes[-8:] == [finder.batch_size] * 8
    assert len([record for record in actmem.adaptation.history if not record.is_check]) == 2
    assert actmem.engine.plan
    (last,) = [trial for trial in finder.search.trials if trial.batch_size == finder.batch_size]
    assert last.stored_bytes is not None
    assert 0 < actmem.engine.report().saved_bytes <= last.stored_bytes
