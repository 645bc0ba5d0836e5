"""The numbers of one adaptation: errors of sub-batches that rounding does different amounts to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_actmem.adapt.measurement import Measurement, Measuring
from lightning_actmem.saved.site import Site
from lightning_actmem_kernels import CodecSpec

SITE, SPEC = Site("layer", "linear", "input", 0), CodecSpec("rotated", 2)


class Part:
    """A sub-batch with known errors: of the whole plan, and of the one site."""

    stored_bytes = 8

    def __init__(self, total: float, error: float) -> None:
        self.uses = {SITE: None}
        self.errors = [total, error]

    def segments(self, site: Site, spec: CodecSpec) -> list[Tensor]:
        return []


class Known:
    """Stands for the gradients: returns the errors of the parts, one after the other."""

    def take(self, part: Part) -> tuple[Tensor, Tensor]:
        return torch.tensor(1.0), torch.tensor(1.0)

    def error(self, part: Part, specs: Any) -> Tensor:
        return torch.tensor(part.errors.pop(0))


def measured(parts: Sequence[Part]) -> Measurement:
    measuring: Any = Measuring([])
    measuring._exact = Known()
    for part in parts:
        measuring.begin(part, {SITE: SPEC})
        measuring.replay(part, [(SITE, SPEC)], {SITE: [SPEC]})
    found: Measurement = measuring.result()
    return found


def test_errors_count_relative_to_what_the_whole_plan_does_to_their_part() -> None:
    found = measured([Part(1.0, 0.1), Part(3.0, 0.3)])
    assert found.totals == [1.0, 3.0]
    assert found.errors[SITE, SPEC] == pytest.approx([0.2, 0.2])


def test_a_part_with_hardly_any_error_does_not_blow_the_sites_up() -> None:
    found = measured([Part(0.01, 0.1), Part(3.0, 0.3)])
    assert found.errors[SITE, SPEC] == pytest.approx([0.2, 0.3 * 1.505 / 3])


def test_without_any_error_of_the_plan_the_parts_are_taken_as_they_are() -> None:
    assert measured([Part(0.0, 0.1), Part(0.0, 0.3)]).errors[SITE, SPEC] == pytest.approx([0.1, 0.3])


def test_overflow_is_told() -> None:
    assert not measured([Part(float("inf"), 0.1), Part(1.0, 0.3)]).is_finite
