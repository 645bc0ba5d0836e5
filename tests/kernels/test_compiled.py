"""The compiled CPU path: when it starts, that it returns the reference's bits, and that its failure stops nothing."""

from __future__ import annotations

import pytest
import torch

from lightning_actmem_kernels import CodecSpec, cpu_path, decode, encode
from lightning_actmem_kernels.reference import compiled, fixed, uniform

NUMEL = 2 * compiled.CHUNK_ELEMENTS_CPU + 777  # two chunks that may be compiled and a last one that may not


@pytest.fixture
def state(monkeypatch):
    fresh = compiled._Compiled()
    monkeypatch.setattr(compiled, "_state", fresh)
    monkeypatch.setattr(compiled, "_has_compiler", lambda: True)
    return fresh


def _round_trip(x, spec, key):
    payload = encode(x, spec, key=key)
    return *payload, decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=key)


def test_short_runs_never_compile(state):
    _round_trip(torch.randn(NUMEL), CodecSpec("uniform"), 1)
    assert not state.functions
    assert sum(state.seen.values()) == 4 * compiled.CHUNK_ELEMENTS_CPU
    assert cpu_path().startswith("eager: torch.compile starts after")


def test_without_a_compiler(state, monkeypatch):
    monkeypatch.setattr(compiled, "_has_compiler", lambda: False)
    monkeypatch.setattr(compiled, "AFTER_ELEMENTS", 0)
    _round_trip(torch.randn(NUMEL), CodecSpec("uniform"), 1)
    assert not state.functions
    assert cpu_path().startswith("eager: no C++ compiler")


def test_a_failing_compiler_stops_nothing(state, monkeypatch):
    x, spec = torch.randn(NUMEL), CodecSpec("uniform")
    wanted = _round_trip(x, spec, 1)

    def broken(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(compiled, "AFTER_ELEMENTS", 0)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: broken)
    assert all(map(torch.equal, _round_trip(x, spec, 1), wanted))
    assert cpu_path() == "eager: torch.compile failed with OSError"


@pytest.mark.slow
@pytest.mark.skipif(not compiled._has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("rounding", ["dither", "nearest"])
@pytest.mark.parametrize(("codec", "bits"), [("uniform", 1), ("uniform", 3), ("uniform", 4), ("fixed", 3)])
def test_the_same_bits(state, monkeypatch, codec, bits, rounding):
    x, spec = torch.randn(NUMEL) * torch.logspace(-30, 30, NUMEL), CodecSpec(codec, bits, rounding=rounding, low=-0.5)
    x[::100_003] = torch.nan
    wanted = [_round_trip(x, spec, key) for key in (-5, 2**62)]
    monkeypatch.setattr(compiled, "AFTER_ELEMENTS", 0)
    for key, expected in zip((-5, 2**62), wanted, strict=True):
        for a, b in zip(_round_trip(x, spec, key), expected, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert cpu_path() == "compiled: 2 functions"
    module = {"uniform": uniform, "fixed": fixed}[codec]
    assert {case[0] for case in state.functions} == {module.encode_groups, module.decode_groups}


@pytest.mark.slow
@pytest.mark.skipif(not compiled._has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("spec", "functions"), [(CodecSpec("bfp", 4), 2), (CodecSpec("fp8_e4m3"), 1), (CodecSpec("fp8_e5m2"), 1)], ids=str
)
def test_the_same_bits_under_a_power_of_two(state, monkeypatch, spec, functions):
    x = torch.randn(NUMEL) * torch.logspace(-30, 30, NUMEL)
    x[::100_003] = torch.nan
    wanted = _round_trip(x, spec, 9)
    monkeypatch.setattr(compiled, "AFTER_ELEMENTS", 0)
    for a, b in zip(_round_trip(x, spec, 9), wanted, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert cpu_path() == f"compiled: {functions} functions"
