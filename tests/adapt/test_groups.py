"""What other groups do to the error of a rotated code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_actmem import ActMemEngine
from lightning_actmem.adapt.groups import regrouped
from lightning_actmem.adapt.replay import ExactGradient
from lightning_actmem_kernels import CodecSpec, decode, encode
from tests import models

DRAWS = 20
# What fills up the last group takes a little of its error.
TOLERANCE = 0.1


def error(x: Tensor, spec: CodecSpec) -> float:
    found = [
        (decode(encode(x, spec, key=key), spec, numel=x.numel(), dtype=x.dtype, key=key) - x).square().sum()
        for key in range(DRAWS)
    ]
    return (torch.stack(found).mean()).item()


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("numel", [16 * 1024, 16 * 1024 + 300, 1700])
@pytest.mark.parametrize("bits", [1, 2])
def test_the_error_goes_with_the_energy_of_the_groups(bits: int, numel: int, centre: bool) -> None:
    """Groups of 256 with a mean and a size of their own: those of 1024 are told to err more, as they do."""
    place = torch.arange(numel) // 256
    x = torch.randn(numel) * (1 + place % 4) + place % 3
    small = CodecSpec("rotated", bits, 256, centre=centre)
    large = replace(small, group_size=1024)
    growth = regrouped([x[:500], x[500:]], small, [small, large])
    wanted = (error(x[:500], large) + error(x[500:], large)) / (error(x[:500], small) + error(x[500:], small))
    assert list(growth) == [large]
    assert growth[large].item() == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize("mean", [0.0, 0.3, 2.0])
def test_without_the_mean_the_error_grows_by_its_energy(mean: float) -> None:
    x, spec = mean + torch.randn(16 * 1024), CodecSpec("rotated", 2, centre=True)
    other = replace(spec, group_size=1024, centre=False)
    growth = regrouped([x], spec, [spec, other])[other].item()
    assert growth == pytest.approx(1 + mean**2, rel=TOLERANCE)
    assert growth == pytest.approx(error(x, other) / error(x, spec), rel=TOLERANCE)


def test_only_the_groups_of_a_rotated_code_may_differ() -> None:
    x, spec = torch.randn(4096), CodecSpec("rotated", 2)
    others = [replace(spec, bits=3), CodecSpec("uniform", 2, 1024)]
    assert regrouped([x], spec, [spec, *others]) == {}
    assert regrouped([x], CodecSpec("uniform", 2), others) == {}


def test_a_site_whose_tensors_have_died_has_nothing_to_compare() -> None:
    spec = CodecSpec("rotated", 2)
    assert regrouped([], spec, [spec, replace(spec, group_size=1024)]) == {}


def test_a_tensor_without_energy_has_no_more_in_larger_groups() -> None:
    spec = CodecSpec("rotated", 2, centre=True)
    assert [
        growth.item() for growth in regrouped([torch.ones(4096)], spec, [replace(spec, group_size=512)]).values()
    ] == [1]


def test_the_variance_of_the_gradient_follows() -> None:
    """Behind a ReLU's sign, where what is encoded is not the tensor itself."""
    model, x = models.ResNet((1, 1), width=16, classes=10), torch.randn(8, 3, 64, 64)
    engine = ActMemEngine(bits=2, adapt=True)
    replay = engine.probe(lambda: torch.nn.functional.cross_entropy(model(x), torch.arange(8)), model, inputs=x)
    exact = ExactGradient(list(model.parameters()))
    exact.take(replay)
    signed = [payload for reference in replay._rounding.payloads if (payload := reference()) and payload.sign]
    small = CodecSpec("rotated", 2, centre=True)
    large = replace(small, group_size=1024)
    for payload in signed[:3]:
        segments = list(replay.segments(payload.site, small))
        assert not torch.equal(segments[0], payload.raw())
        told = regrouped(segments, small, [large])[large].item()
        found = [sum(exact.error(replay, {payload.site: spec}).item() for _ in range(16)) for spec in (large, small)]
        assert told == pytest.approx(found[0] / found[1], rel=0.2)
