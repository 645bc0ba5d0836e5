"""`ActMemBatchSizeFinder`: what it finds, in how many trials, and what it says."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule
from lightning_utilities.core import rank_zero as rank_zero_module
from torch.utils.data import DataLoader

from lightning_actmem import ActMem, ActMemBatchSizeFinder, ActMemError
from tests.integration.sized_nets import Attention, Convolutions, Mlp, SizedNet, measured_peak
from tests.integration.support import (
    PACK_ALL,
    ManualNet,
    Net,
    dataset,
    fit,
    is_untouched,
    new_trainer,
)

MIB = 2**20
LARGE_SHARE = 0.95


@pytest.mark.parametrize("build", [Mlp, Convolutions, Attention])
@pytest.mark.parametrize("settings", [{}, {"bits": 4}], ids=["plain", "4 bits"])
def test_finds_nearly_the_largest_batch_in_few_trials(build, settings):
    """Larger by what 95 % leaves open, and it would not fit."""
    budget = 4 * MIB
    finder = ActMemBatchSizeFinder(budget)
    model = build()
    callbacks = [ActMem(**settings, summary=False)] if settings else []
    fit(model, callbacks=[*callbacks, finder], max_steps=1)
    found = finder.batch_size
    assert found is not None
    assert len(finder.search.trials) <= 4
    assert model.sizes[-1] == model.batch_size == found
    assert measured_peak(build(), found, **settings) <= budget
    if found < 4096:
        assert measured_peak(build(), int(found / LARGE_SHARE) + 1, **settings) > budget


def test_manual_optimisation(tmp_path):
    class SizedManualNet(ManualNet):
        sizes: list[int]

    model = SizedManualNet(samples=4096)
    finder = ActMemBatchSizeFinder("1MiB")
    fit(model, callbacks=[finder], max_steps=4)
    assert model.batch_size == finder.batch_size > 8


def test_accumulation_reaches_the_second_step():
    finder = ActMemBatchSizeFinder("1MiB")
    fit(SizedNet(), callbacks=[finder], accumulate_grad_batches=3, max_steps=1)
    assert finder.batch_size > 8


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_the_batch_size_of_a_datamodule_and_of_hparams():
    class Data(LightningDataModule):
        def __init__(self, batch_size: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return DataLoader(dataset(1024), batch_size=self.hparams.batch_size)

    class Loaderless(Net):
        train_dataloader = None

        def __init__(self) -> None:
            super().__init__()
            del self.batch_size

    data = Data()
    finder = ActMemBatchSizeFinder("1MiB")
    new_trainer(callbacks=[finder]).fit(Loaderless(), datamodule=data)
    assert data.hparams.batch_size == finder.batch_size


def test_it_says_what_it_did(caplog):
    with caplog.at_level("INFO", logger=rank_zero_module.log.name):
        finder = ActMemBatchSizeFinder("1MiB")
        fit(SizedNet(), callbacks=[ActMem(**PACK_ALL), finder], max_steps=1)
    (line,) = [record.message for record in caplog.records if "ActMemBatchSizeFinder" in record.message]
    assert f"batch_size={finder.batch_size}; tried 8: " in line
    assert "per sample" in line
    assert "stored for the backward pass" in line
    assert sum("Trainer.fit` stopped" in record.message for record in caplog.records) == 1


def test_an_error_in_a_trial_is_no_lack_of_memory():
    class Broken(SizedNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) > 8:
                raise RuntimeError("shapes differ")
            return self.loss(batch)

    model = Broken()
    trainer = new_trainer(callbacks=[ActMem(), ActMemBatchSizeFinder("1MiB")])
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.fit(model)
    assert model.batch_size == 8
    assert is_untouched(trainer)


def test_a_bug_that_reads_like_lack_of_memory_is_named():
    class Broken(SizedNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("my table is out of memory cells")

    trainer = new_trainer(callbacks=[ActMemBatchSizeFinder("1MiB")])
    with pytest.raises(ActMemError, match=r"not even one sample .* RuntimeError: my table is out of") as caught:
        trainer.fit(Broken())
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError)
    assert "training_step" in [frame.name for frame in traceback.extract_tb(cause.__traceback__)]


@pytest.mark.slow
@pytest.mark.parametrize("wording", ["HIP out of memory", "could not create a primitive", "std::bad_alloc"])
def test_memory_that_runs_out_in_a_trial(wording):
    """The error comes below the budget; the batch that is found is one that ran."""

    class Scarce(SizedNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) > 100:
                raise RuntimeError(wording)
            return super().training_step(batch, batch_idx)

    model = Scarce()
    finder = ActMemBatchSizeFinder("1MiB", max_trials=6)
    fit(model, callbacks=[ActMem(**PACK_ALL), finder])
    assert 50 <= finder.batch_size <= 100
    assert model.sizes[-1] == finder.batch_size
    assert any(trial.out_of_memory for trial in finder.search.trials)
