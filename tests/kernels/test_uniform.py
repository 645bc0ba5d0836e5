"""The uniform codec: its error bound, its bias and variance, and what it does at the edges of floating point."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.reference import chunks

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
ROUNDINGS = ("dither", "stochastic", "nearest")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 31, 255, 256, 257, 1009, 4097)
DRAWS = 4096
SIGMAS = 5.0
# Largest error in steps. Three roundings in (x - lo) / step may shift a code at a border: 255 * 3 * 2**-24 < 1e-4.
# Positions are rounded to 1/256 first, which `nearest` shows.
WORST = {"dither": 0.5 + 1e-4, "nearest": 0.5 + 2.0**-9 + 1e-4, "stochastic": 1.0}
# Relative rounding of the restored value: of the float32 sum, and of the cast to nearest.
CAST = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}

INPUTS = {
    "normal": lambda n: torch.randn(n),
    "far from zero": lambda n: torch.randn(n) + 1000.0,
    "negative": lambda n: -torch.rand(n) - 3.0,
    "constant": lambda n: torch.full((n,), 0.1),
    "constant in bfloat16": lambda n: torch.full((n,), -1.5),
    "zeros": lambda n: torch.zeros(n),
    "negative zeros": lambda n: -torch.zeros(n),
    "one outlier": lambda n: torch.randn(n).index_fill(0, torch.tensor([n // 2]), 500.0),
    "denormal": lambda n: torch.randn(n) * 1e-39,
    "denormal step": lambda n: torch.rand(n) * 2.0**-120,
    "denormal in float16": lambda n: torch.randn(n) * 1e-6,
    "two values": lambda n: (torch.rand(n) < 0.5).float() * 7.0,
}


def _grid(grids):
    return (grids & -0x10000).view(torch.float32), (grids << 16).view(torch.float32)


def _per_element(per_group, spec, numel):
    return per_group.repeat_interleave(spec.group_size)[:numel]


def _round_trip(x, spec, key=11):
    payload = encode(x, spec, key=key)
    return payload, decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=key)


def _assert_bounded(x, spec):
    (_, grids), back = _round_trip(x, spec)
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    step = _per_element(_grid(grids)[0], spec, x.numel())
    slack = CAST[x.dtype] * (x.float().abs() + step) + SMALLEST[x.dtype]
    assert bool(((back.float() - x.float()).abs() <= WORST[spec.rounding] * step + slack).all())


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_error_bound(name, rounding):
    for numel, bits, dtype in itertools.product(NUMELS, BITS, FLOATS):
        _assert_bounded(INPUTS[name](numel).to(dtype), CodecSpec("uniform", bits, rounding=rounding))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_error_bound_for_every_group_size(group_size):
    for numel, bits in itertools.product(NUMELS, BITS):
        _assert_bounded(torch.randn(numel), CodecSpec("uniform", bits, group_size))


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=100),
    st.sampled_from(BITS),
    st.sampled_from(ROUNDINGS),
)
def test_error_bound_for_any_values(values, bits, rounding):
    _assert_bounded(torch.tensor(values), CodecSpec("uniform", bits, 32, rounding))


def test_the_grid_covers_its_group_and_no_more():
    x = torch.randn(1000, 64) * torch.logspace(-30, 30, 1000)[:, None]
    for bits in BITS:
        _, grids = encode(x.view(-1), CodecSpec("uniform", bits, 64), key=0)
        step, lo = _grid(grids)
        levels = (1 << bits) - 1
        top = lo.double() + levels * step.double()
        assert bool((lo <= x.amin(1)).all())
        assert bool((top >= x.amax(1) * (1 - 2.0**-23)).all())
        # Outward rounding to 8 significant bits widens the range by 2**-7 of the minimum and 2**-7 of itself.
        widest = (x.amax(1) - x.amin(1)) + 2.0**-7 * x.amin(1).abs()
        assert bool((levels * step <= widest * (1 + 2.0**-7)).all())


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 2.0**-126, 2.0**100])
def test_constant_groups_are_exact(value):
    for bits, rounding in itertools.product(BITS, ROUNDINGS):
        _, back = _round_trip(torch.full((300,), value), CodecSpec("uniform", bits, rounding=rounding))
        assert bool((back == value).all())


def _draws(x, spec):
    """Restored x, float64 [keys, n]."""
    draws = torch.empty(DRAWS, x.numel(), dtype=torch.float64)
    for key in range(DRAWS):
        draws[key] = _round_trip(x, spec, key)[1]
    return draws


@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
def test_unbiased_with_the_variance_of_theory(rounding):
    """Over keys: step^2/12 for dither whatever the value, step^2 f(1 - f) for stochastic rounding."""
    spec = CodecSpec("uniform", 2, 64, rounding)
    x = torch.randn(64)
    step, lo = (t.double() for t in _grid(encode(x, spec, key=0)[1]))
    error = _draws(x, spec) - x.double()
    f = ((x.double() - lo) / step) % 1
    variance = step**2 / 12 if rounding == "dither" else step**2 * f * (1 - f)
    # Noise has 256 values, which shifts the mean of stochastic rounding by up to half of 1/256.
    resolution = step / 512 if rounding == "stochastic" else 0.0
    assert bool((error.mean(0).abs() <= SIGMAS * (variance / DRAWS) ** 0.5 + resolution).all())
    assert error.square().mean() == pytest.approx(float(variance.mean()), rel=0.03)


@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
def test_the_mean_over_elements_is_unbiased(rounding):
    """The 256 values of the noise do not add up to a bias: over elements what they shift averages out."""
    x = torch.rand(1 << 20)
    spec = CodecSpec("uniform", 2, rounding=rounding)
    (_, grids), back = _round_trip(x, spec)
    error = back.double() - x.double()
    step = float(_grid(grids)[0].max())
    assert abs(float(error.mean())) < SIGMAS * (step**2 / 4 / x.numel()) ** 0.5


def test_dither_error_is_uncorrelated_with_the_value():
    x = torch.randn(1 << 18)
    _, back = _round_trip(x, CodecSpec("uniform", 2))
    assert abs(float(torch.corrcoef(torch.stack((back - x, x)))[0, 1])) < SIGMAS / x.numel() ** 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_group_with_a_non_finite_value_comes_back_non_finite(bad, dtype):
    for bits, rounding, place in itertools.product(BITS, ROUNDINGS, (256, 300, 511, 999)):
        x = torch.randn(1000).to(dtype)
        x[place] = bad
        _, back = _round_trip(x, CodecSpec("uniform", bits, rounding=rounding))
        finite = [bool(group.isfinite().all()) for group in back.split(256)]
        broken = [not bool(group.isfinite().any()) for group in back.split(256)]
        assert broken == [first == place // 256 for first in range(4)]
        assert finite == [not b for b in broken]


def test_a_range_beyond_float32_comes_back_non_finite():
    x = torch.tensor([3e38, -3e38] * 16)
    _, back = _round_trip(x, CodecSpec("uniform", 4, 32))
    assert bool(back.isnan().all())


def test_the_largest_step():
    """Up to 2**126 the inverse of the step is a normal number; beyond, some devices would flush it to zero."""
    x = torch.tensor([0.0, 2.0**126] * 16)
    spec = CodecSpec("uniform", 1, 32, "nearest")
    assert torch.equal(_round_trip(x, spec)[1], x)
    assert bool(_round_trip(x * 1.01, spec)[1].isnan().all())


def test_float16_saturates_instead_of_overflowing():
    x = torch.linspace(-65504, 65504, 4096).half()
    for bits in BITS:
        _, back = _round_trip(x, CodecSpec("uniform", bits))
        assert bool(back.isfinite().all())


def test_chunking_changes_no_bit(monkeypatch):
    x = torch.randn(9001)
    for spec in (CodecSpec("uniform", bits, rounding=rounding) for bits in BITS for rounding in ROUNDINGS):
        payload, back = _round_trip(x, spec)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "CHUNK_ELEMENTS_CPU", 2048)
            again, back_again = _round_trip(x, spec)
        assert all(map(torch.equal, payload, again))
        assert torch.equal(back, back_again)


def test_another_key_is_other_noise():
    x = torch.randn(4096)
    spec = CodecSpec("uniform", 2)
    assert not torch.equal(encode(x, spec, key=1)[0], encode(x, spec, key=2)[0])
    nearest = CodecSpec("uniform", 2, rounding="nearest")
    assert torch.equal(encode(x, nearest, key=1)[0], encode(x, nearest, key=2)[0])
