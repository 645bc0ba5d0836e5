"""The benchmark of what a launch costs the host, and what a warm call may do: counted here, since time is not."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")
import triton

from benchmarks import launch
from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.triton.launch import Case, as_it_is

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "clone", "contiguous"}
MOST_FUNCTIONS = 9


def _gpu():
    return nullcontext() if DEVICE == "cuda" else launch.no_gpu()


def test_every_codec_and_size_has_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "CALLS", 2)
    monkeypatch.setattr(launch, "ROUNDS", 2)
    path = tmp_path / "rows.csv"
    launch.main(["--numel", "1000", "2048", "--csv", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [spec.label for spec in launch.SPECS]
    assert [(row["numel"], row["codec"]) for row in rows] == [(n, label) for n in ("1000", "2048") for label in labels]
    for row in rows:
        assert min(float(row["encode_us"]), float(row["decode_us"])) > 0
        assert (row["path"], row["triton"], row["torch"]) == ("triton", triton.__version__, torch.__version__)
        assert row["dtype"] == ("bool" if row["codec"] == "mask-1" else "bfloat16")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(rows)]] == 2 * labels


def test_bytes_are_those_of_the_allocator(monkeypatch):
    monkeypatch.setattr(launch, "CALLS", 1)
    monkeypatch.setattr(launch, "ROUNDS", 1)
    bytes_of = {}
    with _gpu():
        for numel in (512, 1024):
            row = next(launch.rows(numel, torch.bfloat16, torch.device(DEVICE)))
            assert row["codec"] == "uniform-4"
            bytes_of[numel] = row["cuda_bytes"], row["packed_cuda_bytes"]
    assert bytes_of == {512: (1024, 1024), 1024: (2048, 1024)}


@pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU is taken for a GPU")
def test_afterwards_kernels_run():
    x, spec = torch.randn(1024), CodecSpec("uniform", 4)
    with launch.no_gpu():
        decode(encode(x, spec, key=1), spec, numel=1024, dtype=x.dtype, key=1)
    for backend in (None, "triton"):
        found, wanted = (encode(x, spec, key=1, backend=name) for name in (backend, "torch"))
        assert all(map(torch.equal, found, wanted))


@pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU is taken for a GPU")
def test_a_direct_launch_gives_the_launcher_what_triton_gives_it(monkeypatch):
    """The installed Triton's own way, which its hooks ask for, differs in what only they read."""
    launched = []
    monkeypatch.setattr(launch.NoLaunch, "launch", lambda self, *arguments: launched.append(arguments))
    case, tensors = Case(None, (4, True), (as_it_is, as_it_is), launch.no_device()), (torch.zeros(8), torch.zeros(4))
    with launch.no_gpu():
        for hooked in (False, False, True):  # the first one compiles
            monkeypatch.setattr("lightning_actmem_kernels.triton.launch._hooked", lambda hooked=hooked: hooked)
            case.launch(3, tensors, (8, -1))
    direct, by_triton = launched
    assert len(direct) == len(by_triton)
    differing = [(ours, theirs) for ours, theirs in zip(direct, by_triton, strict=True) if ours != theirs]
    assert len(differing) <= 3  # metadata, and hooks on either side
    assert all(ours is None for ours, _ in differing)
    assert direct[:3] == (3, 1, 1)


class Calls:
    """Counts the package's functions that run, by module and name, and allocations."""

    def __init__(self):
        self.functions, self.allocations = Counter(), 0

    def __call__(self, frame, event, function):
        module = frame.f_globals["__name__"]
        if event == "call" and module.startswith("lightning_actmem_kernels."):
            self.functions[module.rsplit(".", 1)[1], frame.f_code.co_name] += 1
        elif event == "c_call":
            self.allocations += function.__name__ in ALLOCATIONS

    @classmethod
    def of(cls, run):
        """Of the third call."""
        for _ in range(2):
            run()
        calls, previous = cls(), sys.getprofile()
        sys.setprofile(calls)
        try:
            run()
        finally:
            sys.setprofile(previous)
        return calls


@pytest.mark.parametrize("spec", launch.SPECS, ids=lambda spec: spec.label)
def test_a_warm_call_looks_up_allocates_what_it_returns_and_launches(spec):
    """What does not depend on the tensor's values is found once: constants, grids, tiles, modules, compiled kernels."""
    with _gpu():
        x = launch.tensor(spec.codec, torch.bfloat16, 4096, torch.device(DEVICE))
        payload = encode(x, spec, key=1)
        for run, tensors in (
            (lambda: encode(x, spec, key=1), len(payload)),
            (lambda: decode(payload, spec, numel=4096, dtype=x.dtype, key=1), 1),
        ):
            calls = Calls.of(run)
            assert calls.allocations == tensors
            assert calls.functions["launch", "launch"] == 1
            assert set(calls.functions.values()) == {1}, calls.functions
            assert len(calls.functions) <= MOST_FUNCTIONS, calls.functions


def test_the_rows_in_the_repository_are_within_the_limit():
    with launch.CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["codec"] for row in rows} == {spec.label for spec in launch.SPECS}
    for row in rows:
        if row["driver"] == "left out":  # the limit is one of our own and Triton's Python
            assert max(float(row["encode_us"]), float(row["decode_us"])) < launch.LIMIT_US
