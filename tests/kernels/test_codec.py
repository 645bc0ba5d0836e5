"""encode and decode: dispatch, what they leave alone, and what they say to bad input."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import lightning_actmem_kernels
from lightning_actmem_kernels import CodecSpec, decode, encode, resolve_backend

PACKAGE = Path(lightning_actmem_kernels.__file__).parent

# Seeded here: the tensors of a parametrized test are made when it is collected, before any fixture has run.
_RANDOM = torch.Generator().manual_seed(0)
_randn, _rand, _randint = (partial(draw, generator=_RANDOM) for draw in (torch.randn, torch.rand, torch.randint))

CASES = [
    (CodecSpec("identity"), _randn(301)),
    (CodecSpec("identity"), _randn(301, dtype=torch.complex64)),
    (CodecSpec("uniform"), _randn(301)),
    (CodecSpec("uniform", bits=8), _randn(301)),
    (CodecSpec("rotated"), _randn(301)),
    (CodecSpec("rotated", bits=1, group_size=32, centre=True), _randn(32)),
    (CodecSpec("relu"), _randn(301).relu()),
    (CodecSpec("bfp"), _randn(301)),
    (CodecSpec("fp8_e4m3"), _randn(301)),
    (CodecSpec("fp8_e5m2", group_size=32), _randn(301)),
    (CodecSpec("mask"), _rand(301) < 0.5),
    (CodecSpec("two_valued"), (_rand(301) < 0.5) * 1.25),
    (CodecSpec("integer", bits=4), _randint(0, 16, (301,), dtype=torch.uint8)),
    (CodecSpec("integer", bits=4), _randint(0, 16, (1,))),
    (CodecSpec("integer", bits=32), _randint(0, 2**32, (301,))),
    (CodecSpec("integer", bits=32), _randint(0, 2**31, (301,)).int()),
]


def _name(value):
    """The same in every process, or test runners with several could not agree on what there is to run."""
    return value.label if isinstance(value, CodecSpec) else str(value.dtype)


@pytest.mark.parametrize(("spec", "x"), CASES, ids=_name)
def test_round_trip_shares_no_memory_and_leaves_everything_alone(spec, x):
    before, generator = x.clone(), torch.get_rng_state()
    payload = encode(x, spec, key=3)
    kept = [t.clone() for t in payload]
    first = decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=3)
    first_before = first.clone()
    first.zero_()
    second = decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=3)
    assert torch.equal(x, before)
    assert all(map(torch.equal, payload, kept))
    assert torch.equal(second, first_before)
    assert not spec.lossless or torch.equal(second, x)
    storages = [t.untyped_storage().data_ptr() for t in (x, *payload, first, second)]
    assert len(set(storages)) == len(storages)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_tensor_with_a_graph_is_encoded_without_it():
    x = torch.randn(301, requires_grad=True) * 2
    for spec in (CodecSpec("identity"), CodecSpec("uniform"), CodecSpec("two_valued")):
        payload = encode(x, spec, key=0)
        assert not any(t.requires_grad for t in payload)
        assert not decode(payload, spec, numel=301, dtype=x.dtype, key=0).requires_grad


@pytest.mark.parametrize("key", [-(2**63), -1, 0, 1, 2**32, 2**63 - 1])
def test_any_key(key):
    x = torch.randn(301)
    back = decode(encode(x, CodecSpec("uniform"), key=key), CodecSpec("uniform"), numel=301, dtype=x.dtype, key=key)
    assert bool(((back - x).abs() < 0.3).all())


@pytest.mark.parametrize("key", [-(2**63) - 1, 2**63])
def test_key_out_of_range(key):
    with pytest.raises(ValueError, match=r"key must be in \[-2\*\*63, 2\*\*63\), got .* Take it modulo"):
        encode(torch.randn(4), CodecSpec("uniform"), key=key)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        ("uniform", torch.float64),
        ("uniform", torch.int64),
        ("rotated", torch.float64),
        ("relu", torch.complex64),
        ("bfp", torch.float64),
        ("fp8_e4m3", torch.float64),
        ("mask", torch.uint8),
        ("two_valued", torch.bool),
    ],
)
def test_wrong_dtype(codec, dtype):
    with pytest.raises(TypeError, match=rf"codec '{codec}' takes torch.*, got {dtype}. Use CodecSpec\('identity'\)"):
        encode(torch.zeros(4, dtype=dtype), CodecSpec(codec), key=0)
    with pytest.raises(TypeError, match="takes torch"):
        decode((torch.zeros(4, dtype=torch.uint8),), CodecSpec(codec), numel=4, dtype=dtype, key=0)


@pytest.mark.parametrize("x", [torch.randn(4, 4), torch.randn(8)[::2], torch.tensor(1.0)])
def test_not_flat(x):
    with pytest.raises(ValueError, match=r"flat must be 1-D and contiguous, got size .* Pass Layout"):
        encode(x, CodecSpec("uniform"), key=0)


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_backend_follows_the_device(no_interpreter):
    assert resolve_backend(None, torch.device("cpu")) == "torch"
    assert resolve_backend(None, torch.device("mps")) == "torch"
    assert resolve_backend("torch", torch.device("cuda")) == "torch"


def test_triton_is_the_default_where_it_runs():
    pytest.importorskip("triton")
    for device in ("cuda", "xpu"):
        assert resolve_backend(None, torch.device(device)) == "triton"
        assert resolve_backend("triton", torch.device(device)) == "triton"


def test_on_cpu_the_default_is_torch_even_under_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend(None, torch.device("cpu")) == "torch"
    assert resolve_backend("triton", torch.device("cpu")) == "triton"


def test_triton_on_a_cpu_tensor(no_interpreter):
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match=r"needs a tensor on a CUDA.* device, got one on 'cpu'.*TRITON_INTERPRET=1"):
        encode(torch.randn(4), CodecSpec("uniform"), key=0, backend="triton")


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be 'triton', 'torch' or None, got 'cuda'\. Use None"):
        encode(torch.randn(4), CodecSpec("uniform"), key=0, backend="cuda")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from lightning_actmem_kernels import CodecSpec, decode, encode, resolve_backend
x, spec = torch.randn(1000), CodecSpec("uniform")
back = decode(encode(x, spec, key=1), spec, numel=1000, dtype=x.dtype, key=1)
assert (back - x).abs().max() < 0.5
assert resolve_backend(None, torch.device("cuda")) == "torch"
try:
    encode(x, spec, key=1, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_without_triton():
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert ran.returncode == 0, ran.stderr
    assert "not installed. Run `pip install 'triton>=3.2'`, or use backend='torch'" in ran.stdout


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_the_package_knows_neither_autograd_nor_lightning_and_imports_triton_in_one_place():
    for path in PACKAGE.rglob("*.py"):
        names = set(_imports(path))
        assert not {n for n in names if n.split(".")[0] in {"lightning", "lightning_actmem", "pytorch_lightning"}}
        assert not {n for n in names if n.startswith("torch.autograd")}
        assert "torch.autograd" not in path.read_text()
        assert path.parent.name == "triton" or not {n for n in names if n.split(".")[0] == "triton"}
