"""`ActMemBatchSizeFinder`: what it finds, what it leaves behind (nothing), and what it says about bad input."""

from __future__ import annotations

import json
import random
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core import rank_zero as rank_zero_module
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_actmem import ActMem, ActMemBatchSizeFinder, ActMemError, ActMemWarning, plan
from lightning_actmem.integration.batch_size import engine_of
from lightning_actmem.integration.trials import BatchTrials
from lightning_actmem.predict import Line, Trial
from tests.integration.support import (
    CLASSES,
    FEATURES,
    PACK_ALL,
    WIDTH,
    ManualNet,
    Net,
    assert_bit_equal,
    dataset,
    fit,
    is_untouched,
    new_trainer,
)
from tests.models import MlpBlock

MIB = 2**20
LARGE_SHARE = 0.95
PEAK_ERROR = 0.05


class SizedNet(Net):
    """Notes the size of every batch that it is trained with."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(samples=4096, **kwargs)
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("train")
        self.sizes.append(len(batch[0]))
        return self.loss(batch)


class Mlp(SizedNet):
    """Residual blocks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(*(MlpBlock(FEATURES) for _ in range(6)), nn.Linear(FEATURES, CLASSES))


class Convolutions(SizedNet):
    """Convolutions with batch norm and ReLU, trained by Adam."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)),
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, CLASSES),
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Attention(SizedNet):
    """A transformer layer over features taken as tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Unflatten(1, (FEATURES, 1)),
            nn.Linear(1, WIDTH),
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True),
            nn.Flatten(),
            nn.Linear(FEATURES * WIDTH, CLASSES),
        )


def measured_peak(model: SizedNet, batch_size: int, **settings: Any) -> int:
    """The peak of steps with this batch size."""
    peaks = []

    class Measuring(ActMemBatchSizeFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            with BatchTrials(trainer, engine=engine_of(trainer)) as trials:
                peaks.append(trials.run(batch_size).peak_bytes)

    callbacks = [ActMem(**settings, summary=False)] if settings else []
    fit(model, callbacks=[*callbacks, Measuring()], max_steps=1)
    return peaks[0]


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
    # Near this budget the packed residual blocks reach the size from which tensors are packed in chunks: a kink.
    assert len(finder.search.trials) <= (6 if build is Mlp and settings else 4)
    assert model.sizes[-1] == model.batch_size == found
    assert measured_peak(build(), found, **settings) <= budget
    if found < 4096:
        assert measured_peak(build(), int(found / LARGE_SHARE) + 1, **settings) > budget


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4, 2])
@pytest.mark.parametrize(("build", "small"), [(Mlp, 512), (Convolutions, 256), (Attention, 512), (SizedNet, 512)])
def test_predicted_peak_is_within_five_percent_of_the_measured_one(build, small, bits):
    """The line through a quarter and half of the batch. `plan`'s tests have two more models."""
    settings = {} if bits is None else {"bits": bits}
    trials = [Trial(size, measured_peak(build(), size, **settings)) for size in (small, 2 * small)]
    predicted = Line.through(*trials).peak_bytes(4 * small)
    assert predicted == pytest.approx(measured_peak(build(), 4 * small, **settings), rel=PEAK_ERROR)


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


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_goes_on_being_resumed(tmp_path):
    checkpoint, again = (ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True) for _ in range(2))
    fit(SizedNet(), callbacks=[checkpoint], enable_checkpointing=True, max_steps=2)
    model, finder = SizedNet(), ActMemBatchSizeFinder("1MiB", max_batch_size=32)
    trainer = new_trainer(callbacks=[finder, again], enable_checkpointing=True, max_steps=5)
    trainer.fit(model, ckpt_path=checkpoint.last_model_path)
    assert trainer.global_step == 5
    assert model.sizes[-3:] == [32] * 3


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
    finder = ActMemBatchSizeFinder("1MiB")
    fit(model, callbacks=[ActMem(**PACK_ALL), finder])
    assert 50 <= finder.batch_size <= 100
    assert model.sizes[-1] == finder.batch_size
    assert any(trial.out_of_memory for trial in finder.search.trials)


class Samples(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(dataset(self.count))


class StreamNet(SizedNet):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Samples(self.count), batch_size=self.batch_size)


def test_an_iterable_dataset_works():
    model = StreamNet(4096)
    finder = ActMemBatchSizeFinder("256KiB")
    fit(model, callbacks=[finder])
    assert model.sizes[-1] == finder.batch_size > 8


def test_an_iterable_dataset_with_few_samples_is_a_limit():
    model = StreamNet(50)
    finder = ActMemBatchSizeFinder("64MiB")
    fit(model, callbacks=[finder])
    assert finder.search.limit == 50
    assert finder.batch_size <= 50


class NoBatchSize(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(64), batch_size=8)


class FixedBatchSize(Net):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(64), batch_size=4)


class OwnBatches(Net):
    def train_dataloader(self) -> DataLoader[Any]:
        data = dataset(64)
        return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, drop_last=False))


class Batches:
    def __iter__(self) -> Any:
        return iter([dataset(8)[:]])


class OwnIterable(Net):
    def train_dataloader(self) -> Any:
        return Batches()


BAD = {
    NoBatchSize: "must be an attribute 'batch_size' of the model, its hparams or the datamodule",
    FixedBatchSize: "must use the attribute 'batch_size': it was set to 8, and the DataLoader has batch size 4",
    OwnBatches: "must give a DataLoader with a batch size, got DataLoader without one",
    OwnIterable: "must give a DataLoader with a batch size, got Batches without one",
}


@pytest.mark.parametrize("build", BAD)
def test_data_whose_batch_size_cannot_be_set(build):
    trainer = new_trainer(callbacks=[ActMem(), ActMemBatchSizeFinder("1MiB")])
    with pytest.raises(ActMemError, match=BAD[build]):
        trainer.fit(build())
    assert is_untouched(trainer)


def test_loaders_given_to_fit():
    model = Net()
    with pytest.raises(ActMemError, match="that was given to fit\\(\\) cannot be changed"):
        new_trainer(callbacks=[ActMemBatchSizeFinder("1MiB")]).fit(model, model.loader())


@pytest.mark.parametrize(
    ("budget", "message"),
    [("1KiB", "more than the .* weights and buffers take, got 1.0 KiB"), ("15KiB", "not even one sample fits")],
)
def test_a_budget_that_is_too_small(budget, message):
    with pytest.raises(ActMemError, match=message):
        fit(Net(), callbacks=[ActMemBatchSizeFinder(budget)])


def test_memory_that_does_not_grow_with_the_batch():
    class Flat(SizedNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net[0].weight * torch.ones(1000, 1, 1)).sum()

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([torch.tensor(0)] * 64, batch_size=self.batch_size, collate_fn=lambda items: [items])

    model = Flat()
    with pytest.warns(ActMemWarning, match=r"memory does not grow with the batch .* batch_size stays 8"):
        fit(model, callbacks=[ActMemBatchSizeFinder("64MiB")])
    assert model.batch_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0}, "start must be 1 or more, got 0"),
        ({"max_trials": 2}, "max_trials must be 3 or more, got 2"),
        ({"margin": 1.0}, "margin must be a share"),
        ({"budget": "much"}, "like '4GiB'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActMemBatchSizeFinder(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "8"}, "start must be a whole number, got '8'"),
        ({"start": True}, "start must be a whole number, got True"),
        ({"max_batch_size": 8.5}, "max_batch_size must be a whole number, got 8.5"),
        ({"margin": "0.1"}, "margin must be a number, got '0.1'"),
    ],
)
def test_arguments_of_a_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        ActMemBatchSizeFinder(**arguments)


def test_fast_dev_run_leaves_the_batch_size():
    model = Net()
    with warnings.catch_warnings():
        fit(model, callbacks=[ActMemBatchSizeFinder("1MiB")], fast_dev_run=True, max_steps=-1)
    assert model.batch_size == 8


class TellingNet(SizedNet):
    """Writes down what each process has found; the second one has less memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and len(batch[0]) > 60:
            raise RuntimeError("CUDA out of memory")
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        Path(self.folder, f"rank{self.global_rank}.json").write_text(json.dumps([self.batch_size, self.sizes[-1]]))


@pytest.mark.slow
@pytest.mark.own_process
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_all_processes_take_the_batch_of_the_one_with_the_least_memory(tmp_path):
    model = TellingNet(tmp_path)
    fit(
        model,
        callbacks=[ActMemBatchSizeFinder("1MiB")],
        strategy=DDPStrategy(start_method="spawn"),  # torch's profiler does not survive a fork
        devices=2,
        max_steps=2,
    )
    told = [json.loads(Path(tmp_path, f"rank{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert 30 <= told[0][0] <= 60
    assert told[0][0] == told[0][1]
