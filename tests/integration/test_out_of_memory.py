"""Memory that really runs out: child processes whose address space is limited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAST_GAIN = 3.5
LEAST_SHARE = 0.95
MAX_TRIALS = 4
MODELS = ("mlp", "gpt", "vit")
STEPS = {"binsearch": 20, "predict": 60}
# Every tensor's pages go back to the system when it dies, so that the limit is about tensors and not about fragments.
# Lightning's finder needs it said; this project's says it itself.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc"),
]


@lru_cache
def found(finder: str, way: str, folder: str, model: str = "mlp") -> dict[str, Any]:
    """What a limited process tells at its end."""
    environment = {
        **{name: value for name, value in os.environ.items() if name not in MALLOC},
        **(MALLOC if finder == "binsearch" else {}),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-m", "tests.integration.limited_memory", finder, way, folder, model, str(STEPS[finder])]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("limited"))


@pytest.mark.parametrize("way", ["callback", "strategy"])
def test_binsearch_finds_a_larger_batch_and_trains_with_it(way, folder):
    """Lightning's own finder."""
    plain, packed = found("binsearch", "plain", folder), found("binsearch", way, folder)
    assert packed["batch"] >= LEAST_GAIN * plain["batch"]
    assert plain["steps"] == packed["steps"] == STEPS["binsearch"]
    assert packed["largest_of_last_steps"] == packed["batch"]
    assert (plain["compressed"], packed["compressed"]) == (False, True)  # in every trial


@pytest.mark.parametrize("model", MODELS)
def test_the_prediction_is_nearly_what_binsearch_finds_and_trains(model, folder):
    searched, predicted = (found(finder, "callback", folder, model) for finder in ("binsearch", "predict"))
    assert predicted["batch"] >= LEAST_SHARE * searched["batch"]
    assert_found_in_few_trials_and_trains(predicted)
    assert predicted["compressed"]


@pytest.mark.parametrize(("way", "model"), [("plain", "mlp"), ("callback", "resnet")])
def test_the_predicted_batch_trains(way, model, folder):
    """Plainly, and with convolutions, whose library keeps a workspace that grows with the batch."""
    assert_found_in_few_trials_and_trains(found("predict", way, folder, model))


def assert_found_in_few_trials_and_trains(told: dict[str, Any]) -> None:
    assert told["trials"] <= MAX_TRIALS, told["did"]
    assert told["steps"] == STEPS["predict"]
    assert told["largest_of_last_steps"] == told["batch"]
