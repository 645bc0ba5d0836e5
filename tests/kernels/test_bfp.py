"""The block floating point codec: its exponent, its error bound, its bias and variance, and the edges of float32."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, Layout, decode, encode
from lightning_actmem_kernels.reference import chunks

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
ROUNDINGS = ("dither", "stochastic", "nearest")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 31, 255, 256, 257, 1009, 4097)
DRAWS = 4096
SIGMAS = 5.0
# Largest error in steps: positions are rounded to 1/256 before a code is chosen.
WORST = {"dither": 0.5 + 2.0**-9, "nearest": 0.5 + 2.0**-9, "stochastic": 1.0 + 2.0**-9}
# Relative rounding of the cast to nearest, and what lies below the smallest normal number.
CAST = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}
BIAS, NO_SCALE = 119, 255

INPUTS = {
    "normal": lambda n: torch.randn(n),
    "far from zero": lambda n: torch.randn(n) + 1000.0,
    "negative": lambda n: -torch.rand(n) - 3.0,
    "constant": lambda n: torch.full((n,), 0.1),
    "zeros": lambda n: torch.zeros(n),
    "one outlier": lambda n: torch.randn(n).index_fill(0, torch.tensor([n // 2]), 500.0),
    "denormal": lambda n: torch.randn(n) * 1e-39,
    "smallest step": lambda n: torch.rand(n) * 2.0**-120,
    "denormal in float16": lambda n: torch.randn(n) * 1e-6,
}


def _round_trip(x, spec, key=11):
    payload = encode(x, spec, key=key)
    return payload, decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=key)


def _step(exponents):
    return torch.where(exponents == 0, 0.0, torch.exp2(exponents.double() - BIAS))


def _assert_bounded(x, spec):
    (_, exponents), back = _round_trip(x, spec)
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    step = _step(exponents).repeat_interleave(spec.group_size)[: x.numel()]
    slack = CAST[x.dtype] * (x.double().abs() + step) + SMALLEST[x.dtype]
    assert bool(((back.double() - x.double()).abs() <= WORST[spec.rounding] * step + slack).all())


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_error_bound(name, rounding):
    for numel, bits, dtype in itertools.product(NUMELS, BITS, FLOATS):
        _assert_bounded(INPUTS[name](numel).to(dtype), CodecSpec("bfp", bits, rounding=rounding))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_error_bound_for_every_group_size(group_size):
    for numel, bits in itertools.product(NUMELS, BITS):
        _assert_bounded(torch.randn(numel), CodecSpec("bfp", bits, group_size))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=100),
    st.sampled_from(BITS),
    st.sampled_from(ROUNDINGS),
)
def test_error_bound_for_any_values(values, bits, rounding):
    _assert_bounded(torch.tensor(values), CodecSpec("bfp", bits, 32, rounding))


@given(st.floats(2.0**-110, 2.0**120, width=32), st.sampled_from(BITS))
def test_the_step_is_the_smallest_power_of_two_that_reaches_the_maximum(largest, bits):
    (_, exponents), _ = _round_trip(torch.tensor([0.0, -largest]), CodecSpec("bfp", bits, 32))
    top = 2 ** (bits - 1) - 1
    step = float(_step(exponents))
    assert top * step / 2 < largest <= top * step


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_what_lies_on_the_grid_is_exact(rounding):
    """Zeros, powers of two and every multiple of the step, whatever the noise."""
    for bits in BITS:
        top = 2 ** (bits - 1) - 1
        x = (torch.arange(300) % (2 * top + 1) - top) * 2.0**-7
        for key in range(20):
            assert torch.equal(_round_trip(x, CodecSpec("bfp", bits, rounding=rounding), key)[1], x)
        constant = torch.full((300,), -0.25)
        assert torch.equal(_round_trip(constant, CodecSpec("bfp", bits, rounding=rounding))[1], constant)


def test_zeros_are_exact_in_every_rounding_and_have_no_sign():
    for bits, rounding in itertools.product(BITS, ROUNDINGS):
        (_, exponents), back = _round_trip(torch.tensor([0.0, -0.0] * 150), CodecSpec("bfp", bits, rounding=rounding))
        assert not bool(exponents.any())
        assert torch.equal(back.view(torch.int32), torch.zeros(300, dtype=torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
@pytest.mark.parametrize("bits", [2, 4])
def test_unbiased_with_the_variance_of_theory(bits, rounding):
    """Over keys: step^2/12 for dither whatever the value, step^2 f(1 - f) for stochastic rounding."""
    spec = CodecSpec("bfp", bits, 64, rounding)
    x = torch.randn(64)
    step = _step(encode(x, spec, key=0)[1])
    error = torch.stack([_round_trip(x, spec, key)[1].double() - x.double() for key in range(DRAWS)])
    f = (x.double() / step) % 1
    variance = step**2 / 12 if rounding == "dither" else step**2 * f * (1 - f)
    # Noise has 256 values, which shifts the mean of stochastic rounding by up to half of 1/256.
    resolution = step / 512 if rounding == "stochastic" else 0.0
    assert bool((error.mean(0).abs() <= SIGMAS * (variance / DRAWS) ** 0.5 + resolution).all())
    assert error.square().mean() == pytest.approx(float(variance.mean()), rel=0.03)


@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
def test_the_mean_over_elements_is_unbiased(rounding):
    x = torch.rand(1 << 20) * 2 - 1
    (_, exponents), back = _round_trip(x, CodecSpec("bfp", 3, rounding=rounding))
    step = float(_step(exponents).max())
    assert abs(float((back.double() - x.double()).mean())) < SIGMAS * (step**2 / 4 / x.numel()) ** 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_group_with_a_non_finite_value_comes_back_non_finite(bad, dtype):
    for bits, rounding, place in itertools.product(BITS, ROUNDINGS, (256, 300, 511, 999)):
        x = torch.randn(1000).to(dtype)
        x[place] = bad
        (codes, exponents), back = _round_trip(x, CodecSpec("bfp", bits, rounding=rounding))
        assert torch.equal(back.isnan(), torch.arange(1000) // 256 == place // 256)
        assert exponents[place // 256] == NO_SCALE
        assert not bool(codes[place // 256].any())


def test_the_largest_step():
    """Up to 2**126 its 256-fold inverse is a normal number; beyond, some devices would flush it to zero."""
    x = torch.tensor([0.0, 2.0**126, -(2.0**126)] * 10)
    spec = CodecSpec("bfp", 2, 32, "nearest")
    assert torch.equal(_round_trip(x, spec)[1], x)
    assert bool(_round_trip(x * 1.01, spec)[1].isnan().all())
    assert bool(_round_trip(x * 1.01, CodecSpec("bfp", 4, 32, "nearest"))[1].isfinite().all())


def test_float16_saturates_instead_of_overflowing():
    x = torch.linspace(-65504, 65504, 4096).half()
    for bits in BITS:
        assert bool(_round_trip(x, CodecSpec("bfp", bits))[1].isfinite().all())


def test_strides_are_kept():
    x = torch.randn(40, 50).t()
    layout, spec = Layout.of(x), CodecSpec("bfp", 8)
    back = layout.unflatten(_round_trip(layout.flatten(x), spec)[1])
    assert (back.shape, back.stride()) == (x.shape, x.stride())
    assert float((back - x).abs().max()) < 0.05


def test_chunking_changes_no_bit(monkeypatch):
    x = torch.randn(9001)
    for spec in (CodecSpec("bfp", bits, rounding=rounding) for bits in BITS for rounding in ROUNDINGS):
        payload, back = _round_trip(x, spec)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "CHUNK_ELEMENTS_CPU", 2048)
            again, back_again = _round_trip(x, spec)
        assert all(map(torch.equal, payload, again))
        assert torch.equal(back, back_again)


def test_a_key_determines_the_codes():
    x = torch.randn(4096)
    spec, nearest = CodecSpec("bfp", 2), CodecSpec("bfp", 2, rounding="nearest")
    assert torch.equal(encode(x, spec, key=1)[0], encode(x, spec, key=1)[0])
    assert not torch.equal(encode(x, spec, key=1)[0], encode(x, spec, key=2)[0])
    assert torch.equal(encode(x, nearest, key=1)[0], encode(x, nearest, key=2)[0])
