"""The rotated codec: its error against theory, its bias, and what it does at the edges of floating point."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.reference import chunks, rotated

BITS = (1, 2, 3, 4)
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 31, 255, 256, 257, 1009, 4097)
# Mean square error of the Lloyd-Max quantiser of N(0, 1) (Max, 1960, table 1).
LLOYD_MAX_MSE = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
DRAWS = 2048
SIGMAS = 5.0


def _round_trip(x, spec, key=11):
    payload = encode(x, spec, key=key)
    return decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=key)


def _relative_error(x, spec):
    return float((_round_trip(x, spec) - x).square().sum() / x.square().sum())


INPUTS = {
    "normal": lambda n: torch.randn(n),
    "uniform": lambda n: torch.rand(n),
    "heavy-tailed": lambda n: torch.randn(n) / torch.rand(n).clamp_min(0.01),
    "half zeros": lambda n: torch.randn(n).relu(),
    "scaled by group": lambda n: (torch.randn(n // 256, 256) * torch.logspace(-15, 15, n // 256)[:, None]).view(-1),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bits", BITS)
def test_error_of_theory_whatever_the_distribution(name, bits):
    """At most mse / (1 - mse) of the Lloyd-Max quantiser; outliers, which rotate to few magnitudes, cost less."""
    mse = LLOYD_MAX_MSE[bits]
    x = INPUTS[name](1 << 17)
    spec = CodecSpec("rotated", bits)
    groups = x.view(-1, 256)
    error = (_round_trip(x, spec).view(-1, 256) - groups).square().sum(1) / groups.square().sum(1)
    assert float(error.mean()) < 1.02 * mse / (1 - mse)
    assert name == "heavy-tailed" or float(error.mean()) > 0.95 * mse / (1 - mse)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_error_of_every_group_size(group_size):
    for bits, dtype in itertools.product(BITS, FLOATS):
        x = torch.randn(1 << 15).to(dtype)
        spec = CodecSpec("rotated", bits, group_size)
        # Groups of 32 lie a little below the theory of large ones.
        assert _relative_error(x.float(), spec) == pytest.approx(
            LLOYD_MAX_MSE[bits] / (1 - LLOYD_MAX_MSE[bits]), rel=0.15
        )
        assert _round_trip(x, spec).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_unbiased(bits, centre):
    """The mean over keys is the tensor, within its own standard error."""
    x = torch.randn(256) + 0.5
    spec = CodecSpec("rotated", bits, centre=centre)
    draws = torch.stack([_round_trip(x, spec, key) for key in range(DRAWS)]).double()
    standard_error = draws.std(0) / math.sqrt(DRAWS)
    # The scale of each draw is rounded to 8 bits, to nearest: 2**-9 at most, and both ways.
    assert bool(((draws.mean(0) - x).abs() <= SIGMAS * standard_error + 2.0**-10 * x.abs()).all())
    assert float((draws.mean(0) - x).square().mean() / standard_error.square().mean()) < 1.5


def test_the_error_is_uncorrelated_with_the_value_in_every_group():
    x = torch.randn(1000, 256) * 3 + 1
    for bits in BITS:
        error = _round_trip(x.view(-1), CodecSpec("rotated", bits)).view_as(x) - x
        projection = (error * x).sum(1) / x.square().sum(1)
        assert float(projection.abs().max()) < 2.0**-8  # the rounding of the scale to bfloat16


def test_errors_of_elements_and_keys_are_uncorrelated():
    x = torch.randn(1 << 17)
    spec = CodecSpec("rotated", 2)
    first, second = _round_trip(x, spec, 1) - x, _round_trip(x, spec, 2) - x
    pairs = {"next element": (first[:-1], first[1:]), "next group": (first[:-256], first[256:]), "key": (first, second)}
    for a, b in pairs.values():
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < SIGMAS / x.numel() ** 0.5


def test_the_mean_costs_no_bits_of_the_rest():
    x = torch.randn(1 << 15) + 100.0
    plain = _relative_error(x, CodecSpec("rotated", 2))
    centred = _relative_error(x, CodecSpec("rotated", 2, centre=True))
    assert plain == pytest.approx(0.133, rel=0.05)
    assert centred < plain / 1000


@pytest.mark.parametrize("place", [0, 100, 255])
def test_a_single_value_comes_back_whole(place):
    """Its rotation has one magnitude, so every width stores it exactly, up to the rounding of the scale."""
    x = torch.zeros(256)
    x[place] = 3.0
    for bits in BITS:
        back = _round_trip(x, CodecSpec("rotated", bits))
        assert float(back[place]) == pytest.approx(3.0, rel=2.0**-8)
        back[place] = 0
        assert not bool(back.any())


@pytest.mark.parametrize("centre", [False, True])
def test_zeros_and_constants(centre):
    for numel, bits, dtype in itertools.product(NUMELS, BITS, FLOATS):
        zeros = torch.zeros(numel, dtype=dtype)
        assert torch.equal(_round_trip(zeros, CodecSpec("rotated", bits, centre=centre)), zeros)
    constant = torch.full((512,), -1.5)
    assert torch.equal(_round_trip(constant, CodecSpec("rotated", 1, centre=True)), constant)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf"), 2.0**127])
@pytest.mark.parametrize("centre", [False, True])
def test_a_group_with_a_non_finite_value_comes_back_non_finite(bad, centre):
    for bits, place in itertools.product(BITS, (256, 300, 511, 999)):
        x = torch.randn(1000)
        x[place] = bad
        back = _round_trip(x, CodecSpec("rotated", bits, centre=centre))
        broken = [bool(group.isnan().all()) for group in back.split(256)]
        assert broken == [first == place // 256 for first in range(4)]
        assert [bool(group.isfinite().all()) for group in back.split(256)] == [not b for b in broken]


@pytest.mark.parametrize("exponent", [-126, -100, 0, 100, 126])
def test_any_magnitude(exponent):
    x = torch.randn(4096).clamp(-4, 4) / 4 * 2.0**exponent
    for centre in (False, True):
        back = _round_trip(x, CodecSpec("rotated", 4, centre=centre))
        error = ((back.double() - x.double()) / 2.0**exponent).square().sum()
        assert float(error / (x.double() / 2.0**exponent).square().sum()) < 0.011


def test_float16_saturates_instead_of_overflowing():
    x = torch.linspace(-65504, 65504, 4096).half()
    for bits in BITS:
        assert bool(_round_trip(x, CodecSpec("rotated", bits)).isfinite().all())


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=100),
    st.sampled_from(BITS),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
)
def test_the_error_is_bounded_for_any_values(values, bits, centre, key):
    """|error| <= |x| of the group times sqrt(S^2 |l|^2 / |z|^2 - 1): S is finite whatever the values are."""
    x = torch.tensor(values)
    padded = torch.nn.functional.pad(x.double(), (0, -x.numel() % 32)).view(-1, 32)
    back = _round_trip(x, CodecSpec("rotated", bits, 32, centre=centre), key)
    error = torch.nn.functional.pad(back.double() - x.double(), (0, -x.numel() % 32)).view(-1, 32)
    # The smallest level is at worst a factor of 21 below the largest (4 bits), and a rotation keeps lengths.
    assert bool((error.norm(dim=1) <= 3.0 * padded.norm(dim=1) + 2.0**-120).all())


def test_chunking_changes_no_bit(monkeypatch):
    x = torch.randn(9001)
    for spec in (CodecSpec("rotated", bits, group) for bits in BITS for group in (32, 256)):
        payload, back = encode(x, spec, key=3), _round_trip(x, spec, 3)
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "CHUNK_ELEMENTS_CPU", 2048)
            again, back_again = encode(x, spec, key=3), _round_trip(x, spec, 3)
        assert all(map(torch.equal, payload, again))
        assert torch.equal(back, back_again)


def _lloyd_max_gap(levels):
    """Largest distance of a level from the mean of N(0, 1) over its cell."""
    borders = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
    density = [math.exp(-(b**2) / 2) / math.sqrt(2 * math.pi) for b in borders]
    above = [math.erfc(b / math.sqrt(2)) / 2 for b in borders]
    means = [(density[i] - density[i + 1]) / (above[i] - above[i + 1]) for i in range(len(levels))]
    return max(abs(level - mean) for level, mean in zip(levels, means, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_lloyd_max(bits):
    assert len(rotated.LEVELS[bits]) == 2 ** (bits - 1)
    assert _lloyd_max_gap(rotated.LEVELS[bits]) < 2e-6
