"""What only a GPU can show: compiled kernels return the reference's bits, on any stream and for tensors of any size."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_actmem_kernels import CodecSpec, decode, encode

pytestmark = pytest.mark.gpu

SPECS = [
    *(CodecSpec("uniform", bits, rounding=r) for bits in (1, 2, 3, 4, 8) for r in ("dither", "stochastic", "nearest")),
    *(CodecSpec("relu", bits) for bits in (2, 3, 4, 8)),
    *(CodecSpec("bfp", bits, rounding=r) for bits in (2, 3, 4, 8) for r in ("dither", "nearest")),
    *(CodecSpec(name, rounding=r) for name in ("fp8_e4m3", "fp8_e5m2") for r in ("stochastic", "nearest")),
    *(CodecSpec("rotated", bits, centre=centre) for bits in (1, 2, 3, 4) for centre in (False, True)),
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (1, 255, 256, 257, 16384, 16385, 1 << 20, (1 << 20) + 3)


def _assert_same(a, b):
    assert (
        torch.equal(torch.where(a.isnan(), 7, a), torch.where(b.isnan(), 7, b))
        if a.dtype.is_floating_point
        else (torch.equal(a, b))
    )


def _round_trip(x, spec, backend):
    payload = encode(x, spec, key=-7, backend=backend)
    return (*payload, decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=-7, backend=backend))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_bits_of_the_reference(spec, dtype):
    for numel in NUMELS:
        x = torch.randn(numel).to(dtype)
        x[numel // 2 :: 5001] = torch.nan
        for a, b in zip(_round_trip(x.cuda(), spec, "triton"), _round_trip(x, spec, "torch"), strict=True):
            _assert_same(a.cpu(), b)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_memory_that_is_not_aligned(offset):
    for dtype, spec in itertools.product(FLOATS, (CodecSpec("uniform"), CodecSpec("rotated"))):
        x = torch.randn(70_000).to(dtype)
        unaligned = x.cuda()[offset:]
        for a, b in zip(_round_trip(unaligned, spec, "triton"), _round_trip(x[offset:], spec, "torch"), strict=True):
            _assert_same(a.cpu(), b)


def test_any_stream():
    x, spec = torch.randn(1 << 22, device="cuda"), CodecSpec("rotated", 2)
    wanted = _round_trip(x, spec, "triton")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = _round_trip(x * 1.0, spec, "triton")
    stream.synchronize()
    for a, b in zip(found, wanted, strict=True):
        _assert_same(a, b)


@pytest.mark.parametrize(
    "spec",
    [
        CodecSpec("uniform", 2),
        CodecSpec("relu", 2),
        CodecSpec("rotated", 1),
        CodecSpec("bfp", 2),
        CodecSpec("fp8_e4m3"),
    ],
    ids=str,
)
def test_more_than_two_thousand_million_elements(spec):
    numel, group_size = (1 << 31) + 1000, 256
    if torch.cuda.mem_get_info()[0] < 6 * numel:
        pytest.skip("needs 12 GB of free memory")
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(4 * group_size + 1000 % group_size, device="cuda").abs().to(torch.bfloat16)
    x[-tail.numel() :] = tail
    back = decode(encode(x, spec, key=3), spec, numel=numel, dtype=x.dtype, key=3)
    assert not bool(back[: -tail.numel()].any())
    assert float((back[-tail.numel() :].float() - tail.float()).norm() / tail.float().norm()) < 1.0
