"""The codec benchmark measures what it is asked to, on the sizes that it says."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch

from benchmarks import codecs
from lightning_actmem_kernels import CodecSpec

CPU = torch.device("cpu")


def _options(**changes):
    chosen = {"codecs": codecs.CODECS, "bits": list(range(1, 33)), "dtypes": codecs.FLOATS, "mb": [1.0]}
    return argparse.Namespace(**chosen | {"sweep": False} | changes)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_a_sweep_goes_from_256_elements_to_256_megabytes(itemsize):
    sizes = list(codecs.sizes(_options(sweep=True), itemsize))
    assert (sizes[0], sizes[-1] * itemsize) == (256, 256 * 2**20)
    assert all(1 < b / a <= codecs.FACTOR for a, b in itertools.pairwise(sizes))


def test_every_codec_width_and_dtype_is_a_case():
    cases = list(codecs.cases(_options()))
    assert {(spec.codec, spec.bits) for spec, _, _ in cases} == {
        (codec, bits) for codec, widths in codecs.WIDTHS.items() if codec != "identity" for bits in widths
    }
    assert {dtype for spec, dtype, _ in cases if spec.codec == "fixed"} == set(codecs.FLOATS)
    assert {(spec.codec, dtype) for spec, dtype, _ in cases if spec.codec in codecs.OWN_DTYPE} == {
        ("mask", "bool"),
        ("integer", "int64"),
    }
    assert all(numel * getattr(torch, dtype).itemsize == 2**20 for _, dtype, numel in cases)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_rows(codec, monkeypatch):
    monkeypatch.setattr(codecs, "MIN_SECONDS", 0.0)
    dtype = codecs.OWN_DTYPE.get(codec, "bfloat16")
    found = list(codecs.rows(CodecSpec(codec, codecs.WIDTHS[codec][-1]), dtype, 5000, CPU))
    assert [row["direction"] for row in found] == ["encode", "decode"]
    for row in found:
        assert (row["codec"], row["dtype"], row["elements"]) == (codec, dtype, 5000)
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
