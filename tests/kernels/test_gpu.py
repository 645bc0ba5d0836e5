"""What only a GPU can show: compiled kernels return the reference's bits, on any stream and for tensors of any size.

``make test-gpu`` compiles about two thousand kernels, one by one; with ``PYTEST_ARGS="-n 8"``, in eight processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.noise import group_words
from lightning_actmem_kernels.reference import uniform
from lightning_actmem_kernels.spec import GROUP_SIZES, ROUNDINGS, WIDTHS

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# By their last width: those that round, in groups.
GROUPED = ("uniform", "rotated", "relu", "bfp", "fp8_e4m3", "fp8_e5m2", "fixed")
SPECS = [
    CodecSpec(codec, bits, centre=codec == "rotated", low=-4.0, high=4.0) for codec in GROUPED for bits in WIDTHS[codec]
]
# One group, ragged and full; two, ragged; many tiles, ragged and full.
NUMELS = (1, 255, 256, 257, (1 << 20) + 3)
HUGE = (1 << 31) + 1000
SPARE_BYTES_PER_ELEMENT = 7  # 2 there, 2 back, at most 1 of codes, and what a comparison takes


def _name(spec):
    return f"{spec.label}-{spec.group_size}-{spec.rounding}{'-centred' * spec.centre}"


def _bits(t):
    """The bytes of a tensor on the CPU, with one pattern for every NaN."""
    t = t.cpu()
    return (torch.where(t.isnan(), torch.nan, t) if t.is_floating_point() else t).contiguous().view(torch.uint8)


def _assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(_bits(a), _bits(b))


def _round_trip(x, spec, backend):
    payload = encode(x, spec, key=-7, backend=backend)
    return (*payload, decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=-7, backend=backend))


def _values(numel, dtype):
    x = torch.randn(numel).to(dtype)
    x[numel // 2 :: 5001] = torch.nan
    x[numel // 3 :: 7001] = torch.inf
    return x


def _assert_reference(x, spec):
    wanted = _round_trip(x, spec, "torch")
    for _ in range(2):  # the second time by the compiled kernel of the first
        _assert_same(_round_trip(x.cuda(), spec, "triton"), wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=_name)
def test_the_bits_of_the_reference(spec, dtype):
    for numel in NUMELS:
        _assert_reference(_values(numel, dtype), spec)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("codec", GROUPED)
def test_every_group_size_and_rounding(codec, group_size, rounding):
    for dtype in (torch.float32, torch.bfloat16):
        _assert_reference(_values(70_001, dtype), CodecSpec(codec, WIDTHS[codec][-1], group_size, rounding))


@pytest.mark.parametrize("numel", NUMELS)
def test_masks_two_values_and_integers(numel):
    kept = torch.rand(numel) < 0.5
    _assert_reference(kept, CodecSpec("mask"))
    for dtype in (*FLOATS, torch.float64):
        _assert_reference((kept * 1.25).to(dtype), CodecSpec("two_valued"))
    for bits in WIDTHS["integer"]:
        _assert_reference(torch.randint(16, (numel,)), CodecSpec("integer", bits))


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("codec", GROUPED)
def test_memory_that_is_not_aligned(codec, offset):
    for dtype in FLOATS:
        x, spec = _values(70_000, dtype), CodecSpec(codec, WIDTHS[codec][-1])
        wanted = _round_trip(x[offset:], spec, "torch")
        _assert_same(_round_trip(x.cuda()[offset:], spec, "triton"), wanted)
        # Codes too may come from elsewhere than `encode`.
        codes = torch.empty(wanted[0].numel() + offset, dtype=torch.uint8, device="cuda")[offset:]
        payload = (codes.view(wanted[0].shape).copy_(wanted[0]), *(t.cuda() for t in wanted[1:-1]))
        back = decode(payload, spec, numel=x.numel() - offset, dtype=dtype, key=-7, backend="triton")
        _assert_same([back], wanted[-1:])


@pytest.mark.parametrize("spec", [CodecSpec("uniform"), CodecSpec("rotated", 2), CodecSpec("mask")], ids=_name)
def test_the_stream_that_is_current(spec):
    """What is encoded appears on a side stream, late: kernels on another stream would find zeros."""
    values = torch.randn(1 << 22) > 0 if spec.codec == "mask" else torch.randn(1 << 22)
    wanted = _round_trip(values, spec, "torch")
    x, late, stream = values.cuda(), torch.zeros_like(values, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(2):
        with torch.cuda.stream(stream):
            late.zero_()
            torch.cuda._sleep(100_000_000)
            found = _round_trip(late.copy_(x), spec, "triton")
        stream.synchronize()
        _assert_same(found, wanted)


def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, spec = torch.randn(70_001), CodecSpec("uniform")
    wanted = _round_trip(x, spec, "torch")
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        found = _round_trip(x.to(device), spec, "triton")
        assert {t.device for t in found} == {torch.device(device)}
        _assert_same(found, wanted)


def _huge(dtype, spare_bytes_per_element):
    if torch.cuda.mem_get_info()[0] < spare_bytes_per_element * HUGE:
        pytest.skip(f"needs {spare_bytes_per_element * HUGE >> 30} GB of free memory")
    return torch.zeros(HUGE, dtype=dtype, device="cuda")


@pytest.mark.parametrize("spec", SPECS, ids=_name)
def test_more_than_two_thousand_million_elements(spec):
    x = _huge(torch.bfloat16, SPARE_BYTES_PER_ELEMENT)
    groups, whole = -(-HUGE // spec.group_size), HUGE % spec.group_size
    tail = torch.randn(4 * spec.group_size + whole, device="cuda").abs().to(torch.bfloat16)
    x[-tail.numel() :] = tail
    payload = encode(x, spec, key=3)
    back = decode(payload, spec, numel=HUGE, dtype=x.dtype, key=3)
    alone = _round_trip(tail.cpu(), spec, "torch")[-1].cuda()  # with other noise, so another error of the same size
    errors = [float((t.float() - tail.float()).norm()) for t in (back[-tail.numel() :], alone)]
    assert errors[0] < 1.5 * errors[1]
    if spec.codec != "fixed":  # whose levels are none of them 0
        assert not bool(back[: -tail.numel()].any())
    if spec.codec == "uniform":
        first = groups - 5
        words = group_words(3, first, 4, torch.device("cpu"))
        full = tail[: 4 * spec.group_size].view(4, -1).cpu()
        _assert_same(
            [part[first : first + 4] for part in payload], uniform.encode_groups(full, words, spec.bits, "dither")
        )


def test_a_mask_of_more_than_two_thousand_million_elements():
    kept = _huge(torch.bool, 4)
    kept[-1001::7] = True
    (packed,) = encode(kept, CodecSpec("mask"), key=0)
    assert packed.numel() == -(-HUGE // 8)
    assert torch.equal(decode((packed,), CodecSpec("mask"), numel=HUGE, dtype=torch.bool, key=0), kept)


SANITIZED = """
import torch
from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.spec import WIDTHS
for codec, widths in WIDTHS.items():
    for bits in widths:
        for numel in (1, 20001):
            x = torch.randn(numel, device="cuda").bfloat16()
            x = {"mask": x > 0, "two_valued": (x > 0) * 1.25, "integer": (x > 0).long()}.get(codec, x)
            spec = CodecSpec(codec, bits)
            decode(encode(x, spec, key=1), spec, numel=numel, dtype=x.dtype, key=1)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    """Every tensor has an allocation of its own, so that one byte past it is found."""
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "7", sys.executable, "-c", SANITIZED]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]


def test_every_case_is_compiled_once(monkeypatch):
    """The second call with other sizes of the same tile finds what the first one compiled."""
    from lightning_actmem_kernels.triton.launch import Case

    def refuse(*arguments):
        raise AssertionError("compiled before")

    spec = CodecSpec("uniform", 4)
    _round_trip(torch.randn(1 << 16, device="cuda"), spec, "triton")
    monkeypatch.setattr(Case, "_launch_by_triton", refuse)
    for numel in (1 << 16, (1 << 16) + 256, 1 << 17):
        _round_trip(torch.randn(numel, device="cuda"), spec, "triton")
