"""CodecSpec: what it accepts, what it says otherwise, and the bytes it promises."""

from __future__ import annotations

import pytest
import torch

from lightning_actmem_kernels import CodecSpec, encode
from lightning_actmem_kernels.spec import WIDTHS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (0, 1, 7, 8, 31, 255, 256, 257, 1009, 4097)

WRONG = [
    ({"codec": "zip"}, "codec must be one of identity, uniform, .*, two_valued or integer, got 'zip'. Choose one"),
    ({"codec": "uniform", "bits": 7}, "bits must be one of 1, 2, 3, 4, 5, 6 or 8 for codec 'uniform', got 7. Choose"),
    ({"codec": "uniform", "bits": 4.0}, "bits must be one of .* got 4.0"),
    ({"codec": "relu", "bits": 1}, "bits must be one of 2, 3, 4 or 8 for codec 'relu', got 1"),
    ({"codec": "bfp", "bits": 1}, "bits must be one of 2, 3, 4 or 8 for codec 'bfp', got 1"),
    ({"codec": "rotated", "bits": 8}, "bits must be one of 1, 2, 3 or 4 for codec 'rotated', got 8"),
    ({"codec": "rotated", "centre": 1}, "centre must be True or False, got 1"),
    ({"codec": "fixed", "low": 1.0}, "low and high must span a range that float32 can divide, got 1.0 and 1.0. Give"),
    ({"codec": "fixed", "high": float("inf")}, "low and high must span a range"),
    ({"codec": "fixed", "low": float("nan")}, "low and high must span a range"),
    ({"codec": "fixed", "low": 1e6, "high": 1e6 + 1}, "low and high must span a range"),
    ({"codec": "integer", "bits": 3}, "bits must be one of 4, 8, 16 or 32 for codec 'integer', got 3"),
    ({"codec": "uniform", "group_size": -256}, "group_size must be one of 32, .* or 1024, got -256. Use 256"),
    ({"codec": "uniform", "group_size": 48}, "group_size must be one of"),
    ({"codec": "uniform", "rounding": "up"}, "rounding must be one of dither, stochastic or nearest, got 'up'. Use"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_fields_are_named_with_the_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        CodecSpec(**fields)


def test_codecs_with_one_width_set_it():
    assert [CodecSpec(c).bits for c in ("identity", "fp8_e4m3", "fp8_e5m2", "mask", "two_valued")] == [32, 8, 8, 1, 1]
    assert CodecSpec("mask") == CodecSpec("mask", bits=1)


def test_fp8_has_no_dither():
    assert CodecSpec("fp8_e4m3") == CodecSpec("fp8_e4m3", rounding="stochastic")
    assert CodecSpec("fp8_e4m3", rounding="nearest").rounding == "nearest"


def test_specs_are_hashable_values():
    assert len({CodecSpec("uniform"), CodecSpec("uniform", bits=4), CodecSpec("uniform", bits=2)}) == 2


def test_lossless():
    lossless = {codec for codec in WIDTHS if codec != "integer" and CodecSpec(codec).lossless}
    assert lossless == {"identity", "mask", "two_valued"}
    assert CodecSpec("integer", bits=8).lossless


def _stored_cases():
    for codec in ("uniform", "relu", "fixed", "bfp", "fp8_e4m3", "fp8_e5m2"):
        for bits in WIDTHS[codec]:
            for group_size in (32, 256, 1024):
                yield CodecSpec(codec, bits, group_size), FLOATS
    for bits in (1, 2, 3, 4):
        for group_size, centre in ((32, False), (256, True), (1024, False)):
            yield CodecSpec("rotated", bits, group_size, centre=centre), FLOATS
    for bits, dtypes in {
        4: (torch.uint8, torch.int16, torch.int64),
        8: (torch.int16, torch.int32, torch.int64),
        16: (torch.int16, torch.int32, torch.int64),
        32: (torch.int32, torch.int64),
    }.items():
        yield CodecSpec("integer", bits), dtypes
    yield CodecSpec("mask"), (torch.bool,)
    yield CodecSpec("two_valued"), (*FLOATS, torch.float64)
    yield CodecSpec("identity"), (*FLOATS, torch.int64, torch.bool, torch.complex64)


@pytest.mark.parametrize(("spec", "dtypes"), list(_stored_cases()), ids=str)
def test_stored_bytes_is_exact(spec, dtypes):
    for dtype in dtypes:
        for numel in NUMELS:
            payload = encode(torch.ones(numel).to(dtype), spec, key=1)
            assert spec.stored_bytes(numel, dtype) == sum(t.nbytes for t in payload)
            assert spec.stored_bytes(numel, dtype) == sum(t.untyped_storage().nbytes() for t in payload)


@pytest.mark.parametrize(
    ("spec", "stored"),
    [
        (CodecSpec("uniform", bits=4), 1000 * (128 + 4)),
        (CodecSpec("relu", bits=2), 1000 * (64 + 2)),
        (CodecSpec("fixed", bits=2), 1000 * 64),
        (CodecSpec("rotated", bits=1), 1000 * (32 + 2)),
        (CodecSpec("rotated", bits=1, centre=True), 1000 * (32 + 4)),
        (CodecSpec("bfp", bits=3), 1000 * (96 + 1)),
        (CodecSpec("fp8_e5m2"), 1000 * (256 + 1)),
        (CodecSpec("mask"), 32000),
        (CodecSpec("two_valued"), 32004),
        (CodecSpec("integer", bits=4), 128000),
        (CodecSpec("integer", bits=16), 512000),
        (CodecSpec("identity"), 1024000),
    ],
    ids=str,
)
def test_stored_bytes_of_256000_float32(spec, stored):
    assert spec.stored_bytes(256000, torch.float32) == stored
