"""The benchmark of a noise budget: its data, its own measurement of the noise, and its rows."""

from __future__ import annotations

import argparse
import csv
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import noise_budget
from benchmarks.noise_budget import Batches, Follow, Task
from lightning_actmem import ActMem

pytestmark = [
    pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder like CIFAR-10's, of noise."""
    for name in ("data_batch_1", "test_batch"):
        pixels = torch.randint(0, 256, (2000, 3 * 32 * 32), dtype=torch.uint8)
        with (tmp_path / name).open("wb") as file:
            pickle.dump({b"data": pixels.numpy(), b"labels": (torch.arange(2000) % 10).tolist()}, file)
    return tmp_path


def test_measuring_the_noise_leaves_the_training_as_it_is(cifar: Path) -> None:
    work = noise_budget.cifar(cifar)
    batches = Batches(work, 0, 2)
    module, actmem = Task(work.build(), 4), ActMem(noise=0.05, bits=2)
    rows: list[Any] = []
    follow = Follow(actmem, [batches[0], batches[1]], 1, rows.append)
    state, random = {name: value.clone() for name, value in module.state_dict().items()}, torch.get_rng_state()
    coarse = follow.noise(module)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in module.parameters())
    fine = Follow(ActMem(noise=0.05, bits=8), follow.batches, 1, rows.append).noise(module)
    assert coarse > 100 * fine > 0


def test_a_seed_gives_the_same_batches(cifar: Path) -> None:
    work = noise_budget.cifar(cifar)
    first, again, other = (Batches(work, seed, 4)[2] for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("adapt_every", "name"), [(None, "noise=0.05"), (0, "noise=0.05, adapt_every=0")])
def test_every_run_and_every_measurement_has_a_row(
    adapt_every: int | None, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "words.txt"
    text.write_text("to be or not to be, that is the question " * 200)
    options = argparse.Namespace(seeds=[3], steps=24, every=12, adapt_every=adapt_every, csv=tmp_path / "rows.csv")
    noise_budget.record("words", noise_budget.text(text), options)
    with options.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["configuration"], row["step"], bool(row["val_loss"])) for row in rows] == [
        ("plain", "24", True),
        (name, "12", False),
        (name, "24", False),
        (name, "24", True),
    ]
    assert {row["seed"] for row in rows} == {"3"}
    for row in rows[1:3]:
        assert 0 < float(row["noise"]) < 1
        assert float(row["predicted_noise"]) > 0
        assert float(row["ratio"]) > 4
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("words, seed 3, ")]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "give --text FILE (https:"), (["--cifar", "nowhere"], "cifar-10-python.tar.gz")]
)
def test_missing_data_says_where_to_get_it(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        noise_budget.main(arguments)
    found = capsys.readouterr().err
    assert said in found
