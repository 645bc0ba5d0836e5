"""Bits by sample, as ActNN gives them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.adapt.by_sample import WIDTHS, sample_bits
from lightning_actmem_kernels import CodecSpec

SPEC = CodecSpec("uniform", 2, rounding="stochastic")


def loss_of_bits(weights: Tensor, bits: Tensor) -> float:
    return float((weights / (2.0**bits - 1) ** 2).sum())


def allocations(samples: int, total: int) -> Iterator[Tensor]:
    for bits in product(WIDTHS, repeat=samples):
        if sum(bits) <= total:
            yield torch.tensor(bits)


@given(st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4), st.integers(5, 30))
def test_no_allocation_within_the_same_bits_is_better(weights: list[float], average: int) -> None:
    """Greedy steps on a convex law are optimal for the bits that they take."""
    given = torch.tensor(weights)
    length = 1 << 20  # so long that metadata and short groups do not count
    max_bytes = 4 * (length // 256) * 4 + average * length // 8
    bits = sample_bits(given, SPEC, length, torch.float32, max_bytes)
    assert bits is not None
    taken = int(bits.sum())
    assert taken <= max(average, 4)
    best = min(loss_of_bits(given, other) for other in allocations(4, taken))
    assert loss_of_bits(given, bits) <= best * (1 + 1e-6)


def test_too_few_bytes_leave_the_tensor_whole() -> None:
    assert sample_bits(torch.ones(4), SPEC, 1024, torch.float32, 100) is None


def error_of(x: Tensor, weight: Tensor, engine: ActMemEngine) -> Tensor:
    """Return the error of the weight's gradient for an output whose gradient is 1, rows apart."""
    layer = nn.Linear(x.shape[1], len(weight), bias=False)
    layer.weight.data.copy_(weight)
    with engine.compress(layer):
        out = layer(x * 1)
    grad = torch.eye(len(weight))[torch.arange(len(x)) % len(weight)]
    (found,) = torch.autograd.grad(out, [layer.weight], grad)
    return found - grad.T @ x.detach()


def engine_of(bits: int = 2) -> ActMemEngine:
    return ActMemEngine(method="actnn", bits=bits, codec="uniform", rounding="stochastic", min_elements=0)


def test_wide_samples_get_more_bits_in_no_more_bytes() -> None:
    x = (torch.randn(16, 1024) * torch.tensor([0.01] * 8 + [1.0] * 8)[:, None]).requires_grad_()
    weight = torch.zeros(16, 1024)
    plain = ActMemEngine(bits=2, codec="uniform", rounding="stochastic", min_elements=0)
    mixed = engine_of()
    errors = [sum(error_of(x, weight, engine).square().sum() for _ in range(8)) for engine in (plain, mixed)]
    # One half at 1 bit; of the other seven at 3, and one at 2, since the order takes a few bytes: (7 * 9 / 49 + 1) / 8.
    assert float(errors[1] / errors[0]) == pytest.approx(0.286, rel=0.15)
    assert mixed.report().stored_bytes <= plain.report().stored_bytes


def test_every_sample_comes_back_in_its_place_without_bias() -> None:
    x = (torch.randn(16, 512) * torch.logspace(-3, 1, 16)[torch.randperm(16)][:, None]).requires_grad_()
    weight = torch.zeros(16, 512)
    engine = engine_of()
    errors = torch.stack([error_of(x, weight, engine) for _ in range(200)])
    assert torch.all(errors.square().mean((0, 2)).sqrt() < x.detach().abs().amax(1))  # of its own sample's size
    of_means = errors.mean(0).square().mean() * 200 / errors.var(0).mean()
    assert 0.9 < float(of_means) < 1.1


@pytest.mark.parametrize(
    "x",
    [torch.randn(1, 4096), torch.randn(64, 128), torch.randn(1024, 8).t()],
    ids=["one sample", "small samples", "samples side by side"],
)
def test_other_tensors_stay_whole(x: Tensor) -> None:
    x = x.requires_grad_()
    weight = torch.zeros(4, x.shape[1])
    mixed, plain = engine_of(), ActMemEngine(bits=2, codec="uniform", rounding="stochastic", min_elements=0)
    found = [error_of(x, weight, engine) for engine in (mixed, plain)]
    assert torch.equal(*found)


def test_the_ledger_ends_at_nothing() -> None:
    engine, x = engine_of(), torch.randn(16, 1024, requires_grad=True)
    for _ in range(2):
        error_of(x, torch.zeros(16, 1024), engine)
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == engine.ledger.live_raw_bytes == 0
