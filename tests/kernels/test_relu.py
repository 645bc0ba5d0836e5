"""The relu codec: zeros stay zero, positive values stay positive, and the error is that of a uniform grid elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.reference import chunks

BITS = (2, 3, 4, 8)
ROUNDINGS = ("dither", "stochastic", "nearest")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 31, 255, 256, 257, 1009, 4097)
DRAWS = 4096
SIGMAS = 5.0
WORST = {"dither": 0.5 + 1e-4, "nearest": 0.5 + 2.0**-9 + 1e-4, "stochastic": 1.0}
CAST = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}

INPUTS = {
    "relu": lambda n: torch.randn(n).relu(),
    "all positive": lambda n: torch.rand(n) + 0.5,
    "zeros": lambda n: torch.zeros(n),
    "negative zeros": lambda n: -torch.zeros(n),
    "one positive": lambda n: torch.zeros(n).index_fill(0, torch.tensor([n // 2]), 3.0),
    "six decades": lambda n: torch.randn(n).relu() * 10 ** (6 * torch.rand(n) - 6),
    "smallest float32": lambda n: (torch.rand(n) < 0.5).float() * 1e-45,
    "smallest float16": lambda n: (torch.rand(n) < 0.5).float() * 6e-8,
    "lowest level below float16": lambda n: torch.randn(n).relu() ** 4 * 1e-5,
    "large": lambda n: torch.randn(n).relu().clamp_(max=3.0) * 2e4,
}


def _round_trip(x, spec, key=11):
    payload = encode(x, spec, key=key)
    return payload, decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=key)


def _step(steps):
    return (steps.int() << 16).view(torch.float32)


def _assert_sound(x, spec):
    (_, steps), back = _round_trip(x, spec)
    assert back.dtype == x.dtype
    assert torch.equal(back > 0, x > 0)
    assert torch.equal(back == 0, x == 0)
    step = _step(steps).repeat_interleave(spec.group_size)[: x.numel()]
    slack = CAST[x.dtype] * (x.float() + step) + torch.finfo(x.dtype).tiny
    assert bool(((back.float() - x.float()).abs() <= WORST[spec.rounding] * step + slack).all())


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_sign_is_exact_and_error_bounded(name, rounding):
    for numel, bits, dtype in itertools.product(NUMELS, BITS, FLOATS):
        _assert_sound(INPUTS[name](numel).to(dtype), CodecSpec("relu", bits, rounding=rounding))


@pytest.mark.parametrize("group_size", [32, 64, 128, 512, 1024])
def test_every_group_size(group_size):
    for numel, bits in itertools.product(NUMELS, BITS):
        _assert_sound(torch.randn(numel).relu(), CodecSpec("relu", bits, group_size))


@given(
    st.lists(st.floats(0.0, 2.0**100, width=32), min_size=1, max_size=100),
    st.sampled_from(BITS),
    st.sampled_from(ROUNDINGS),
)
def test_any_non_negative_values(values, bits, rounding):
    _assert_sound(torch.tensor(values), CodecSpec("relu", bits, 32, rounding))


def test_negative_values_become_zero():
    x = torch.randn(1000)
    for bits in BITS:
        _, back = _round_trip(x, CodecSpec("relu", bits))
        assert torch.equal(back > 0, x > 0)
        assert bool((back[x <= 0] == 0).all())


def test_the_group_maximum_is_a_level():
    """At 2 bits the levels are 0, then 0, 1/2 and 1 of the maximum: a maximum that is a bfloat16 comes back exactly."""
    x = torch.rand(256).index_fill(0, torch.tensor([7]), 1.0)
    (_, steps), back = _round_trip(x, CodecSpec("relu", 2, rounding="nearest"))
    assert float(_step(steps)) == 0.5
    assert back[7] == 1.0


def test_unbiased_above_the_lowest_level():
    """Below one step the restored value is held above zero, which biases it; above, the mean over keys is x."""
    spec = CodecSpec("relu", 3, 64)
    x = torch.rand(64) + 0.01
    step = float(_step(encode(x, spec, key=0)[1]))
    error = torch.stack([_round_trip(x, spec, key)[1].double() - x.double() for key in range(DRAWS)])
    high = x >= step
    assert 32 < int(high.sum()) < 64
    assert bool((error.mean(0)[high].abs() <= SIGMAS * (step**2 / 12 / DRAWS) ** 0.5).all())
    assert error[:, high].square().mean() == pytest.approx(step**2 / 12, rel=0.03)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_group_with_a_non_finite_value_comes_back_non_finite(bad, dtype):
    for bits, rounding, place in itertools.product(BITS, ROUNDINGS, (256, 300, 511, 999)):
        x = torch.randn(1000).relu().to(dtype)
        x[place] = bad
        _, back = _round_trip(x, CodecSpec("relu", bits, rounding=rounding))
        broken = [not bool(group.isfinite().any()) for group in back.split(256)]
        assert broken == [group == place // 256 for group in range(4)]
        assert torch.equal(back.isfinite().logical_not(), torch.arange(1000) // 256 == place // 256)


def test_float16_saturates_instead_of_overflowing():
    x = torch.linspace(0, 65504, 4096).half()
    for bits in BITS:
        _, back = _round_trip(x, CodecSpec("relu", bits))
        assert bool(back.isfinite().all())


def test_chunking_changes_no_bit(monkeypatch):
    x = torch.randn(9001).relu()
    for spec in (CodecSpec("relu", bits, rounding=rounding) for bits in BITS for rounding in ROUNDINGS):
        payload, back = _round_trip(x, spec)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "CHUNK_ELEMENTS_CPU", 2048)
            again, back_again = _round_trip(x, spec)
        assert all(map(torch.equal, payload, again))
        assert torch.equal(back, back_again)
