"""What adaptation remembers: through checkpoints, in another run, among several callbacks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_actmem import ActMem, ActMemStrategy
from lightning_actmem.integration.adaptation import FIRST_BATCH
from tests.integration.adapting import NOISE, SAMPLES, adaptations, run
from tests.integration.support import (
    PACK_ALL,
    Net,
    assert_bit_equal,
    dataset,
    new_trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")  # sub-batches of 4 samples scatter


class DryNet(Net):
    """Without dropout: Lightning's checkpoints have no random states."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Identity()

    def train_dataloader(self) -> Any:
        """The same batch again and again: Lightning starts a plain loader anew in the middle of an epoch."""
        return DataLoader(Subset(dataset(SAMPLES), list(range(SAMPLES)) * 6), batch_size=SAMPLES)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("stop", [5, 12])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, stop):
    """From the middle of an epoch, between an adaptation and the check of its plan, and from the end of an epoch."""

    def resumable(path: Path | None = None) -> Any:
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
        actmem = ActMem(noise=2 * NOISE, adapt_every=4, **PACK_ALL)
        trainer = new_trainer(callbacks=[actmem, saving], max_steps=-1, max_epochs=4, enable_checkpointing=True)
        torch.manual_seed(0)
        model = DryNet()
        trainer.fit(model, ckpt_path=path)
        assert trainer.global_step == 24
        return model, actmem

    whole, first = resumable()
    resumed, second = resumable(tmp_path / f"step={stop}.ckpt")
    assert second.engine.step == 24
    assert_bit_equal(resumed, whole)
    assert second.engine.state_dict() == first.engine.state_dict()
    assert second.adaptation.state_dict() == first.adaptation.state_dict()
    assert len(adaptations(second)) == 5
    assert any(record.is_check for record in second.adaptation.history)
    assert any(record.changes for record in second.adaptation.history)


def test_the_state_is_loadable_with_weights_only():
    _, actmem = run()
    file = io.BytesIO()
    torch.save(actmem.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = ActMem(noise=NOISE, **PACK_ALL)
    other.load_state_dict(state)
    assert other.state_dict() == actmem.state_dict()
    assert other.adaptation.history[0].bits == actmem.adaptation.history[0].bits


def test_a_state_without_adaptation_is_taken():
    """As versions before had it."""
    actmem = ActMem(noise=NOISE)
    actmem.load_state_dict({"version": 1, "step": 5})
    assert actmem.engine.step == 5
    assert actmem.adaptation.history == []


def test_of_several_equal_ones_each_has_the_state_of_the_one_that_works():
    first, second = (ActMem(noise=NOISE, **PACK_ALL) for _ in range(2))
    run(actmem=first, callbacks=[second])
    assert first.adaptation.history
    assert second.state_dict() == first.state_dict()
    strategy, callback = ActMemStrategy(noise=NOISE, **PACK_ALL), ActMem(noise=NOISE, **PACK_ALL)
    run(actmem=callback, strategy=strategy)
    assert callback.adaptation.history
    assert strategy.actmem.state_dict() == callback.state_dict()


def test_another_run_with_the_same_callback_adapts_afresh():
    actmem = ActMem(noise=NOISE, **PACK_ALL)
    run(batches=12, epochs=3, actmem=actmem)
    actmem.adaptation.capped = True
    earlier = actmem.adaptation.history
    run(batches=20, epochs=1, actmem=actmem)
    record, *checks = actmem.adaptation.history
    assert (record.step, record.epoch, record.is_check) == (FIRST_BATCH, 0, False)
    assert all(check.is_check for check in checks)
    assert record is not earlier[0]
    assert (
        record.bits == run(batches=20, epochs=1, actmem=ActMem(noise=NOISE, **PACK_ALL))[1].adaptation.history[0].bits
    )
    assert actmem.adaptation.capped


def test_a_state_that_is_loaded_before_a_run_is_kept():
    _, actmem = run()
    other = ActMem(noise=NOISE, **PACK_ALL)
    other.load_state_dict(actmem.state_dict())
    run(batches=4, epochs=1, actmem=other)
    earlier = [record.state() for record in actmem.adaptation.history]
    assert [record.state() for record in other.adaptation.history[: len(earlier)]] == earlier


def test_a_batch_size_that_is_searched_for_on_resuming_keeps_its_cap():
    _, actmem = run()
    other = ActMem(noise=NOISE, **PACK_ALL)
    other.adaptation.capped = True
    other.load_state_dict(actmem.state_dict())
    assert other.adaptation.capped


def test_a_run_after_a_checkpoint_has_been_tested_adapts_afresh(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=FIRST_BATCH + 2, save_top_k=-1, filename="{step}")
    actmem = ActMem(noise=2 * NOISE, **PACK_ALL)
    trainer = new_trainer(callbacks=[actmem, saving], max_steps=FIRST_BATCH + 4, enable_checkpointing=True)
    trainer.fit(DryNet())
    history = list(actmem.adaptation.history)
    assert history
    trainer.test(DryNet(), ckpt_path=tmp_path / f"step={FIRST_BATCH + 2}.ckpt", verbose=False)
    assert actmem.adaptation.history == history
    new_trainer(callbacks=[actmem], max_steps=FIRST_BATCH - 1).fit(DryNet())
    assert actmem.adaptation.history
    assert not any(record in history for record in actmem.adaptation.history)
