"""Which warnings of Lightning and its dependencies these tests put up with, and which tests fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OWN_PROCESS = "ACTMEM_TEST_IN_ITS_OWN_PROCESS"
TIMEOUT_SECONDS = 300

ACCEPTED_WARNINGS = (
    # Said about every `training_step(dataloader_iter)`.
    "ignore:You are using the `dataloader_iter` step flavor",
    "ignore:Found `dataloader_iter` argument in the `training_step`",
    # What the test with such a step is about.
    "ignore:`training_step` returned `None`",
    # Runs of a few steps do not reach the 50 of the default.
    "ignore:The number of training batches .* is smaller than the logging interval",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in ACCEPTED_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that forks in a process of its own, with one thread.

    Neither OpenMP's threads nor torch's profiler survive a fork: after other tests its children would hang.
    """
    if pyfuncitem.get_closest_marker("own_process") is None or OWN_PROCESS in os.environ:
        return None
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, OWN_PROCESS: "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if result.returncode:
        pytest.fail(result.stdout + result.stderr, pytrace=False)
    return True
