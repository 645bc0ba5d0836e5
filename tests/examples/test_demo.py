"""The demo, as a user starts it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RUNS = [f"{model}/{run}" for model in ("transformer", "digits_CNN") for run in ("plain", "packed")]


@dataclass(frozen=True)
class Demo:
    """What two runs of the demo have printed and left behind."""

    directory: Path
    outputs: tuple[subprocess.CompletedProcess[str], ...]

    def metrics(self, run: str, version: int = 0) -> list[dict[str, str]]:
        with (self.directory / "logs" / run / f"version_{version}" / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    directory = tmp_path_factory.mktemp("demo")
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    outputs = tuple(
        subprocess.run(
            [sys.executable, str(REPOSITORY / "examples" / "demo.py"), "--fast"],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        for _ in range(2)
    )
    return Demo(directory, outputs)


def test_it_ends_well_and_warns_of_nothing(demo: Demo) -> None:
    for output in demo.outputs:
        assert (output.returncode, output.stderr) == (0, "")


def test_it_prints_one_table_with_both_models(demo: Demo) -> None:
    text = demo.outputs[0].stdout
    assert text.count("ActMem as") == 1
    for words in (" transformer ", 'strategy="actmem"', " digits CNN ", "ActMem(bits=4)"):
        assert words in text
    assert "…" not in text  # nothing is cut off


def test_it_says_where_the_logs_are(demo: Demo) -> None:
    assert f"Logs: {demo.directory / 'logs'}" in demo.outputs[0].stdout
    assert [path.name for path in demo.directory.iterdir()] == ["logs"]


@pytest.mark.parametrize("run", RUNS)
def test_logs(demo: Demo, run: str) -> None:
    losses = [row["train_loss"] for row in demo.metrics(run) if row["train_loss"]]
    assert len(losses) == 3
    assert list((demo.directory / "logs" / run / "version_0").glob("events.out.tfevents.*"))
    ratios = [float(row["actmem/ratio"]) for row in demo.metrics(run) if row.get("actmem/ratio")]
    assert len(ratios) == (3 if run.endswith("packed") else 0)
    assert all(ratio > 3 for ratio in ratios)


@pytest.mark.parametrize("run", RUNS)
def test_it_is_deterministic(demo: Demo, run: str) -> None:
    first, second = ([(row["train_loss"], row["val_loss"]) for row in demo.metrics(run, version)] for version in (0, 1))
    assert first == second


@pytest.mark.parametrize("model", ["transformer", "digits_CNN"])
def test_plain_and_packed_start_from_the_same_weights_and_batch(demo: Demo, model: str) -> None:
    plain, packed = (demo.metrics(f"{model}/{run}")[0]["train_loss"] for run in ("plain", "packed"))
    assert plain == packed
