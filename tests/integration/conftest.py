"""Which warnings of Lightning and its dependencies these tests put up with, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

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
