"""The fixed codec: unbiased within its range at no cost in metadata, clamped outside."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.reference import chunks

BITS = (1, 2, 3, 4, 8)
ROUNDINGS = ("dither", "stochastic", "nearest")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 31, 255, 256, 257, 1009, 4097)
RANGES = ((0.0, 1.0), (-0.129, 1.129), (-1.0, 0.25), (5.0, 5.5))
DRAWS = 4096
SIGMAS = 5.0
# The position on the grid has 8 bits below the point, and half of the last one may be lost.
WORST = {"dither": 0.5 + 1 / 256, "nearest": 0.5 + 1 / 256, "stochastic": 1.0}
CAST = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def _round_trip(x, spec, key=11):
    payload = encode(x, spec, key=key)
    return payload, decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=key)


def _step(spec):
    return (spec.high - spec.low) / ((1 << spec.bits) - 1)


def _assert_sound(x, spec):
    payload, back = _round_trip(x, spec)
    assert len(payload) == 1
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    wanted = x.float().clamp(spec.low, spec.high)
    # Half a step of dither lies beyond the range's ends.
    slack = CAST[x.dtype] * (max(abs(spec.low), abs(spec.high)) + _step(spec))
    assert float((back.float() - wanted).abs().max()) <= WORST[spec.rounding] * _step(spec) + slack


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_error_is_bounded_by_the_step(rounding, dtype):
    for numel, bits, (low, high) in itertools.product(NUMELS, BITS, RANGES):
        x = low + (high - low) * torch.rand(numel)
        _assert_sound(x.to(dtype), CodecSpec("fixed", bits, rounding=rounding, low=low, high=high))


@pytest.mark.parametrize("group_size", [32, 64, 128, 512, 1024])
def test_every_group_size(group_size):
    for numel, bits in itertools.product(NUMELS, BITS):
        _assert_sound(torch.rand(numel), CodecSpec("fixed", bits, group_size))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=100),
    st.sampled_from(BITS),
    st.sampled_from(ROUNDINGS),
    st.sampled_from(RANGES),
)
def test_any_values(values, bits, rounding, bounds):
    _assert_sound(torch.tensor(values), CodecSpec("fixed", bits, 32, rounding, low=bounds[0], high=bounds[1]))


@given(st.floats(-1e6, 1e6), st.floats(2.0**-6, 1e6), st.sampled_from(BITS))
def test_any_range(low, span, bits):
    low, high = float(torch.tensor(low)), float(torch.tensor(low)) + max(span, abs(low) * 2.0**-10)
    _assert_sound(torch.linspace(low, high, 64), CodecSpec("fixed", bits, 32, low=low, high=high))


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unbiased_with_the_variance_of_the_theory(bits, rounding):
    """Over keys: mean x, variance step^2 / 12 of subtractive dither, step^2 f (1 - f) of stochastic rounding."""
    spec = CodecSpec("fixed", bits, 64, rounding, low=-0.129, high=1.129)
    x = torch.linspace(-0.129, 1.129, 64)
    step = _step(spec)
    error = torch.stack([_round_trip(x, spec, key)[1].double() - x.double() for key in range(DRAWS)])
    place = ((x.double() - spec.low) / step) % 1
    variance = torch.full_like(place, step**2 / 12) if rounding == "dither" else step**2 * place * (1 - place)
    assert bool((error.mean(0).abs() <= SIGMAS * (variance.clamp(min=step**2 / 256) / DRAWS).sqrt()).all())
    assert float(error.square().mean()) == pytest.approx(float(variance.mean()), rel=0.03)


def test_nearest_takes_the_nearest_level():
    spec = CodecSpec("fixed", 2, 32, "nearest", low=-1.0, high=2.0)
    x = torch.tensor([-1.0, -0.6, -0.4, 0.4, 0.6, 1.4, 1.6, 2.0])
    assert _round_trip(x, spec)[1].tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_lies_outside_is_moved_to_the_nearer_end_and_nan_to_the_lower(dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 7.0, -7.0], dtype=dtype)
    spec = CodecSpec("fixed", 4, 32, "nearest", low=-1.0, high=2.0)
    assert _round_trip(x, spec)[1].tolist() == [-1.0, 2.0, -1.0, 2.0, -1.0]


def test_chunking_changes_no_bit(monkeypatch):
    x = torch.rand(9001)
    for spec in (CodecSpec("fixed", bits, rounding=rounding) for bits in BITS for rounding in ROUNDINGS):
        payload, back = _round_trip(x, spec)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "CHUNK_ELEMENTS_CPU", 2048)
            again, back_again = _round_trip(x, spec)
        assert all(map(torch.equal, payload, again))
        assert torch.equal(back, back_again)
