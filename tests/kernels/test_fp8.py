"""The scaled float8 codecs: torch's own float8 numbers, error bound, bias and variance, and the edges of float32."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, Layout, decode, encode
from lightning_actmem_kernels.reference import chunks

# torch's dtype, bits of the mantissa, smallest normal number.
FORMATS = {"fp8_e4m3": (torch.float8_e4m3fn, 3, 2.0**-6), "fp8_e5m2": (torch.float8_e5m2, 2, 2.0**-14)}
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
ROUNDINGS = ("stochastic", "nearest")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 31, 255, 256, 257, 1009, 4097)
DRAWS = 4096
SIGMAS = 5.0
WORST = {"stochastic": 1.0, "nearest": 0.5}  # steps
# Relative rounding of the cast to nearest, and what lies below the smallest normal number.
CAST = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}
BIAS, NO_SCALE = 119, 255

INPUTS = {
    "normal": lambda n: torch.randn(n),
    "far from zero": lambda n: torch.randn(n) + 1000.0,
    "constant": lambda n: torch.full((n,), 0.1),
    "zeros": lambda n: torch.zeros(n),
    "eight decades": lambda n: torch.randn(n) * 10 ** (8 * torch.rand(n) - 4),
    "one outlier": lambda n: torch.randn(n).index_fill(0, torch.tensor([n // 2]), 5e4),
    "denormal": lambda n: torch.randn(n) * 1e-39,
    "denormal in float16": lambda n: torch.randn(n) * 1e-6,
}


def _round_trip(x, spec, key=11):
    payload = encode(x, spec, key=key)
    return payload, decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=key)


def _scale(exponents, spec, numel):
    scale = torch.where(exponents == 0, 0.0, torch.exp2(exponents.double() - BIAS))
    return scale.repeat_interleave(spec.group_size)[:numel]


def _step(x, scale, name):
    """Distance of the float8 numbers around each value, in the units of x."""
    _, mantissa, smallest = FORMATS[name]
    magnitude = (x.double() / scale.clamp_min(2.0**-140)).abs().clamp_min(smallest)
    return torch.exp2(magnitude.log2().floor() - mantissa) * scale


def _assert_bounded(x, spec):
    (_, exponents), back = _round_trip(x, spec)
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    bound = WORST[spec.rounding] * _step(x, _scale(exponents, spec, x.numel()), spec.codec)
    slack = CAST[x.dtype] * (x.double().abs() + bound) + SMALLEST[x.dtype]
    assert bool(((back.double() - x.double()).abs() <= bound * (1 + 2.0**-8) + slack).all())


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_error_bound(codec, name, rounding):
    for numel, dtype in itertools.product(NUMELS, FLOATS):
        _assert_bounded(INPUTS[name](numel).to(dtype), CodecSpec(codec, rounding=rounding))


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_error_bound_for_every_group_size(codec, group_size):
    for numel in NUMELS:
        _assert_bounded(torch.randn(numel), CodecSpec(codec, group_size=group_size))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=100),
    st.sampled_from(list(FORMATS)),
    st.sampled_from(ROUNDINGS),
)
def test_error_bound_for_any_values(values, codec, rounding):
    _assert_bounded(torch.tensor(values), CodecSpec(codec, group_size=32, rounding=rounding))


@pytest.mark.parametrize("codec", FORMATS)
def test_nearest_is_the_cast_of_torch(codec):
    dtype = FORMATS[codec][0]
    spec = CodecSpec(codec, rounding="nearest")
    x = torch.randn(16, 256) ** 7 * torch.logspace(-25, 25, 16)[:, None]
    (codes, exponents), back = _round_trip(x.view(-1), spec)
    scale = _scale(exponents, spec, x.numel()).float()
    assert torch.equal(codes.view(-1), (x.view(-1) / scale).to(dtype).view(torch.uint8))
    assert torch.equal(back, codes.view(-1).view(dtype).float() * scale)


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_number_of_the_format_is_exact_and_keeps_its_sign(codec, rounding):
    numbers = torch.arange(256, dtype=torch.uint8).view(FORMATS[codec][0]).float()
    numbers = numbers[numbers.isfinite()]
    for key, factor in itertools.product(range(20), (1.0, 2.0**-60, 2.0**90)):
        (_, _), back = _round_trip(numbers * factor, CodecSpec(codec, rounding=rounding), key)
        assert torch.equal(back.view(torch.int32), (numbers * factor).view(torch.int32))


@given(st.floats(2.0**-100, 2.0**127, width=32), st.sampled_from(list(FORMATS)))
def test_the_scale_is_the_smallest_power_of_two_that_reaches_the_maximum(largest, codec):
    spec = CodecSpec(codec, group_size=32)
    (_, exponents), _ = _round_trip(torch.tensor([0.0, -largest]), spec)
    top = torch.finfo(FORMATS[codec][0]).max
    scale = float(_scale(exponents, spec, 1))
    assert top * scale / 2 < largest <= top * scale


@pytest.mark.slow
@pytest.mark.parametrize("codec", FORMATS)
def test_unbiased_with_the_variance_of_theory(codec):
    """Over keys: the mean is x and the variance step^2 f(1 - f), with the step of each value's own binade."""
    spec = CodecSpec(codec, group_size=64)
    x = torch.randn(64) ** 5
    step = _step(x, _scale(encode(x, spec, key=0)[1], spec, 64), codec)
    error = torch.stack([_round_trip(x, spec, key)[1].double() - x.double() for key in range(DRAWS)])
    f = (x.double().abs() / step) % 1
    variance = step**2 * f * (1 - f)
    # Noise has 256 values, which shifts the mean by up to half of 1/256.
    assert bool((error.mean(0).abs() <= SIGMAS * (variance / DRAWS) ** 0.5 + step / 512).all())
    assert (error / step).square().mean() == pytest.approx(float((f * (1 - f)).mean()), rel=0.03)


@pytest.mark.parametrize("codec", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_group_with_a_non_finite_value_comes_back_non_finite(codec, bad, dtype):
    for rounding, place in itertools.product(ROUNDINGS, (256, 300, 511, 999)):
        x = torch.randn(1000).to(dtype)
        x[place] = bad
        (codes, exponents), back = _round_trip(x, CodecSpec(codec, rounding=rounding))
        assert torch.equal(back.isnan(), torch.arange(1000) // 256 == place // 256)
        assert exponents[place // 256] == NO_SCALE
        assert not bool(codes[place // 256].any())


@pytest.mark.parametrize("codec", FORMATS)
def test_large_values_stay_finite(codec):
    for x in (torch.linspace(-65504, 65504, 4096).half(), torch.linspace(-1, 1, 4096) * 2.9e38):
        for rounding in ROUNDINGS:
            assert bool(_round_trip(x, CodecSpec(codec, rounding=rounding))[1].isfinite().all())


def test_strides_are_kept():
    x = torch.randn(40, 50).t()
    layout = Layout.of(x)
    back = layout.unflatten(_round_trip(layout.flatten(x), CodecSpec("fp8_e4m3"))[1])
    assert (back.shape, back.stride()) == (x.shape, x.stride())
    assert bool(((back - x).abs() <= x.abs() / 8 + 0.01).all())


@pytest.mark.parametrize("codec", FORMATS)
def test_chunking_changes_no_bit(codec, monkeypatch):
    x = torch.randn(9001)
    for rounding in ROUNDINGS:
        spec = CodecSpec(codec, rounding=rounding)
        payload, back = _round_trip(x, spec)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "CHUNK_ELEMENTS_CPU", 2048)
            again, back_again = _round_trip(x, spec)
        assert all(map(torch.equal, payload, again))
        assert torch.equal(back, back_again)


def test_a_key_determines_the_codes():
    x = torch.randn(4096)
    spec, nearest = CodecSpec("fp8_e4m3"), CodecSpec("fp8_e4m3", rounding="nearest")
    assert torch.equal(encode(x, spec, key=1)[0], encode(x, spec, key=1)[0])
    assert not torch.equal(encode(x, spec, key=1)[0], encode(x, spec, key=2)[0])
    assert torch.equal(encode(x, nearest, key=1)[0], encode(x, nearest, key=2)[0])
