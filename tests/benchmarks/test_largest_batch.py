"""The benchmark of the largest batch: what it finds stays within the budget, and the next one does not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import largest_batch
from benchmarks.largest_batch import CSV, NAMES, Adapted, largest, measure, methods
from benchmarks.methods import ActMem, Method, SaveOnCpu


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("start", [1, 8, 300])
@pytest.mark.parametrize("slope", [7, 901])
def test_the_largest_batch_of_memory_that_can_be_written_down(start: int, slope: int) -> None:
    def peak(batch: int) -> int:
        return 5000 + slope * batch + max(0, 2 * (batch - 40))

    found = largest(peak, 100_000, start)
    assert peak(found.batch) == found.peak_bytes <= 100_000 < found.next_peak_bytes == peak(found.next_batch)
    assert found.next_batch - found.batch <= max(1, 0.005 * found.batch)


def test_a_budget_below_one_sample() -> None:
    with pytest.raises(ValueError, match="must allow one sample, which takes 2001, got 2000 bytes"):
        largest(lambda batch: 2000 + batch, 2000, 64)


def test_rows_of_a_model() -> None:
    plain, moved, packed, adapted = measure(
        "mlp", start=96, compared=[Method(), SaveOnCpu(), ActMem(4), Adapted(0.05, min_elements=0)]
    )
    assert plain["batch"] == moved["batch"] == 96
    assert plain["peak_bytes"] == plain["budget_bytes"]
    assert moved["note"] == "no effect on a CPU: same as plain"
    assert packed["method"] == "actmem 4 bits"
    assert packed["batch"] > 1.2 * plain["batch"]
    assert packed["gain"] == pytest.approx(packed["batch"] / plain["batch"], abs=1e-3)
    assert packed["peak_bytes"] <= packed["budget_bytes"] < packed["next_peak_bytes"]
    assert adapted["method"] == "actmem noise=0.05"
    assert 0 < float(adapted["note"].split()[0]) < 8


def test_the_program_appends_to_the_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(largest_batch, "methods", lambda: [Method()])
    path = tmp_path / "rows.csv"
    largest_batch.main(["--model", "mlp", "--budget", "20MiB", "--csv", str(path)])
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["method"], row["gain"]) == ("mlp", "plain", "1.0")
    assert f"| mlp | 20.0 | plain | {row['batch']} | 1.00x |" in capsys.readouterr().out


def test_the_results_in_the_repository_have_every_method() -> None:
    names = [method.name if method.bits is None else f"{method.name} {method.bits} bits" for method in methods()]
    with CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for model in {row["model"] for row in rows}:
        assert model in NAMES
        assert [row["method"] for row in rows if row["model"] == model] == names
