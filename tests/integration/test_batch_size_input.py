"""`ActMemBatchSizeFinder`: data of several kinds, and what it says about bad input."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_actmem import ActMem, ActMemBatchSizeFinder, ActMemError, ActMemWarning
from tests.integration.sized_nets import SizedNet
from tests.integration.support import (
    Net,
    dataset,
    fit,
    is_untouched,
    new_trainer,
)


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


@pytest.fixture
def flat() -> type[SizedNet]:
    class Flat(SizedNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net[0].weight * torch.ones(1000, 1, 1)).sum()

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([torch.tensor(0)] * 64, batch_size=self.batch_size, collate_fn=lambda items: [items])

    return Flat


def test_memory_that_does_not_grow_with_the_batch(flat):
    model = flat()
    with pytest.warns(ActMemWarning, match=r"memory does not grow with the batch .* batch_size stays 8"):
        fit(model, callbacks=[ActMemBatchSizeFinder("64MiB")])
    assert model.batch_size == 8


def test_memory_that_does_not_grow_up_to_the_largest_batch_that_is_wanted(flat):
    model = flat()
    fit(model, callbacks=[ActMemBatchSizeFinder("64MiB", max_batch_size=32)])
    assert model.batch_size == 32


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
