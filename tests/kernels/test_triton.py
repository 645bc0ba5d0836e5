"""Triton returns the reference's bits: under the interpreter without a GPU, compiled with one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.noise import MASK_32, SIGN_STREAM, philox
from lightning_actmem_kernels.reference.bf16 import LARGEST_STEP, SMALLEST_STEP_BITS, inverse

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from lightning_actmem_kernels.triton.noise import philox as triton_philox  # noqa: E402
from lightning_actmem_kernels.triton.values import inverse as triton_inverse  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = {
    "uniform": (1, 2, 3, 4, 5, 6, 8),
    "relu": (2, 3, 4, 8),
    "fixed": (1, 2, 3, 4, 8),
    "rotated": (1, 2, 3, 4),
    "bfp": (2, 3, 4, 8),
    "fp8_e4m3": (8,),
    "fp8_e5m2": (8,),
}
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
ROUNDINGS = ("dither", "stochastic", "nearest")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (0, 1, 31, 255, 256, 257, 1009, 4097)
NAN, INF = float("nan"), float("inf")
WIDTHS = [(codec, bits) for codec, widths in BITS.items() for bits in widths]
# The interpreter computes in numpy, which reports the overflow and the groups of NaN that a GPU passes over in silence.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


def _same(a, b):
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)
        assert torch.equal(a.signbit(), b.signbit())
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


def _assert_equal(x, spec, key):
    """Triton's payload and restored tensor against the reference's on the CPU."""
    wanted = encode(x, spec, key=key, backend="torch")
    payload = encode(x.to(DEVICE), spec, key=key, backend="triton")
    for a, b in zip(payload, wanted, strict=True):
        _same(a, b)
    restored = decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=key, backend="triton")
    _same(restored, decode(wanted, spec, numel=x.numel(), dtype=x.dtype, key=key, backend="torch"))


def _values(numel, codec):
    x = torch.randn(numel) * 3
    return x.relu() if codec == "relu" else x


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("codec", "bits"), WIDTHS)
def test_every_shape_dtype_and_width(codec, bits, dtype):
    rest = itertools.cycle(itertools.product(GROUP_SIZES, ROUNDINGS))
    for key, (numel, (group_size, rounding)) in enumerate(zip(NUMELS, rest, strict=False)):
        _assert_equal(_values(numel, codec).to(dtype), CodecSpec(codec, bits, group_size, rounding), key - 3)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("codec", BITS)
def test_every_group_size_and_rounding(codec, group_size, rounding):
    for bits in BITS[codec][-2:]:
        _assert_equal(_values(2311, codec), CodecSpec(codec, bits, group_size, rounding), 1 << 40)


def _special():
    """Groups of 32 at the edges of floating point; a whole number of groups each, so that none spoils another."""
    normal = torch.randn(32)
    yield normal
    for place, bad in itertools.product((0, 17, 31), (NAN, -NAN, INF, -INF)):
        yield normal.index_fill(0, torch.tensor([place]), bad)
    yield torch.full((32,), NAN)
    yield torch.tensor([INF, -INF] * 16)
    yield torch.zeros(32)
    yield -torch.zeros(32)
    yield torch.tensor([0.0, -0.0] * 16)
    yield torch.tensor([-0.0, 1.0] * 16)
    yield torch.full((32,), 0.1)
    yield torch.full((32,), -0.1)
    yield torch.full((32,), 3.3e38)
    yield normal * 1e-39
    yield normal * 1e-44
    yield normal.abs() * 1e-45
    yield normal * 1e-6
    yield normal + 1000.0
    yield normal * 2e4
    yield torch.linspace(-65504, 65504, 32)
    yield torch.linspace(0, 3.38e38, 32)
    yield torch.arange(32.0)
    yield torch.tensor([2.0**-126, 2.0**-149] * 16)
    yield torch.tensor([3.0] + [0.0] * 31)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("codec", "bits"), WIDTHS)
def test_the_edges_of_floating_point(codec, bits, dtype):
    x = torch.cat(list(_special())).to(dtype)
    for rounding in ROUNDINGS:
        _assert_equal(x, CodecSpec(codec, bits, 32, rounding), 5)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels are those of the GPU that is there")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("codec", "bits"), WIDTHS)
def test_what_runs_on_amd(codec, bits, dtype, monkeypatch):
    from lightning_actmem_kernels.triton import launch

    monkeypatch.setattr(launch.AMD, "value", True)
    for rounding, group_size in zip(ROUNDINGS, (32, 128, 256), strict=True):
        _assert_equal(torch.cat(list(_special())).to(dtype), CodecSpec(codec, bits, 32, rounding), 5)
        for numel in (257, 1024):
            _assert_equal(_values(numel, codec).to(dtype), CodecSpec(codec, bits, group_size, rounding), 5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS["rotated"])
def test_centred_rotation(bits, dtype):
    for group_size, x in itertools.product((32, 256), (torch.cat(list(_special())), torch.randn(1009) + 5)):
        _assert_equal(x.to(dtype), CodecSpec("rotated", bits, group_size, centre=True), 5)


@pytest.mark.parametrize("codec", BITS)
def test_a_range_beyond_float32(codec):
    x = torch.tensor([3e38, -3e38] * 16 + [3.4028234e38, 0.0] * 16 + [1.0, -3.4028234e38] * 16)
    for bits, rounding in itertools.product(BITS[codec], ROUNDINGS):
        _assert_equal(x, CodecSpec(codec, bits, 32, rounding), 5)


@pytest.mark.parametrize("bits", BITS["fixed"])
def test_ranges(bits):
    x = torch.cat(list(_special()))
    for (low, high), rounding in itertools.product(((-0.129, 1.129), (-3e4, 0.1), (1.0, 1.001)), ROUNDINGS):
        _assert_equal(x, CodecSpec("fixed", bits, 32, rounding, low=low, high=high), 5)


@settings(max_examples=60)
@given(
    st.lists(st.floats(-(2.0**126), 2.0**126, width=32) | st.sampled_from((NAN, INF, -INF)), min_size=1, max_size=70),
    st.sampled_from(WIDTHS),
    st.sampled_from(ROUNDINGS),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
)
def test_any_values(values, width, rounding, key, centre):
    codec, bits = width
    _assert_equal(torch.tensor(values), CodecSpec(codec, bits, 32, rounding, centre), key)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 255, 256, 257, 1009, 4097])
def test_mask_and_two_valued(numel):
    kept = torch.rand(numel) < 0.5
    _assert_equal(kept, CodecSpec("mask"), 0)
    _assert_equal(kept * 1.25, CodecSpec("two_valued"), 0)


def test_several_programs(monkeypatch):
    """The interpreter takes one large tile; several small ones must agree at their borders."""
    from lightning_actmem_kernels.triton import mask, tiles

    monkeypatch.setattr(tiles, "_TILE_ELEMENTS_INTERPRETED", 1024)
    for module, name in ((tiles, "_launches"), (mask, "_launch")):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    for codec in BITS:
        _assert_equal(_values(5001, codec), CodecSpec(codec, BITS[codec][-1]), 5)
    _assert_equal(torch.rand(20001) < 0.5, CodecSpec("mask"), 0)


@triton.jit
def _store_words(out_ptr, first: tl.int64, key: tl.int64, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.arange(0, WIDTH)
    w0, w1, w2, w3 = triton_philox(key, first + place.to(tl.int64), STREAM)
    tl.store(out_ptr + place, w0.to(tl.int64))
    tl.store(out_ptr + WIDTH + place, w1.to(tl.int64))
    tl.store(out_ptr + 2 * WIDTH + place, w2.to(tl.int64))
    tl.store(out_ptr + 3 * WIDTH + place, w3.to(tl.int64))


@pytest.mark.parametrize("key", [-(2**63), -5, 0, 1, 16, 2**31, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("first", [0, 2**31 - 8, 2**32 - 8, 2**40])
def test_philox(key, first):
    out = torch.empty(4, 16, dtype=torch.int64, device=DEVICE)
    for stream in (0, SIGN_STREAM):
        _store_words[(1,)](out, first, key, stream, 16)
        words = torch.stack(philox(torch.arange(first, first + 16), key, stream)) & MASK_32
        assert torch.equal(out.cpu(), words)


@triton.jit
def _store_inverses(step_ptr, out_ptr, WIDTH: tl.constexpr):
    place = tl.arange(0, WIDTH)
    tl.store(out_ptr + place, triton_inverse(tl.load(step_ptr + place)))


def test_inverse_of_every_step():
    """Without a division: Newton's iteration, whose last step is exact for the 8 bits of a step."""
    steps = (torch.arange(SMALLEST_STEP_BITS >> 16, 1 << 15, dtype=torch.int32) << 16).view(torch.float32)
    steps = torch.cat([torch.zeros(1), steps[steps <= LARGEST_STEP], torch.tensor([NAN])])
    width = triton.next_power_of_2(len(steps))
    padded = torch.nn.functional.pad(steps, (0, width - len(steps))).to(DEVICE)
    inverses = torch.empty_like(padded)
    _store_inverses[(1,)](padded, inverses, width, enable_fp_fusion=False)
    _same(inverses[: len(steps)], inverse(steps))
