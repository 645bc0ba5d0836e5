"""The rate tables against the codecs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_actmem.adapt.rates import RATES, rate, rescaled
from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.spec import ROUNDINGS, WIDTHS

# Other numbers than those of the table, and fewer.
TOLERANCE = 0.03


@pytest.mark.parametrize(("codec", "rounding", "bits"), [(*key, bits) for key, row in RATES.items() for bits in row])
def test_a_rate_is_what_the_codec_does(codec: str, rounding: str, bits: int) -> None:
    x = torch.randn(2**18)
    spec = CodecSpec(codec, bits, rounding=rounding)
    if codec == "relu":
        x = x.relu()
    if codec == "fixed":
        x, spec = torch.rand(2**18), replace(spec, low=0.0, high=1.0)
    error = decode(encode(x, spec, key=1), spec, numel=x.numel(), dtype=x.dtype, key=1) - x
    assert (error.square().sum() / x.square().sum()).item() == pytest.approx(rate(spec), rel=TOLERANCE)


def test_every_width_of_every_rounding_codec_has_a_rate() -> None:
    wanted = {(codec, rounding) for codec in ("uniform", "relu", "fixed", "bfp") for rounding in ROUNDINGS} | {
        ("rotated", "dither")
    }
    assert set(RATES) == wanted
    assert all(tuple(row) == WIDTHS[codec] for (codec, _), row in RATES.items())


def test_scaling_stays_within_a_codec_and_off_one_bit() -> None:
    two, four = CodecSpec("uniform", 2), CodecSpec("uniform", 4)
    assert rescaled(1.0, two, four) == pytest.approx((3 / 15) ** 2, rel=0.01)
    assert rescaled(1.0, two, two) == 1.0
    assert rescaled(1.0, CodecSpec("uniform", 1), CodecSpec("uniform", 1)) == 1.0
    for other in (CodecSpec("uniform", 1), CodecSpec("rotated", 4), CodecSpec("uniform", 4, rounding="stochastic")):
        assert rescaled(1.0, two, other) is None
    assert rescaled(1.0, CodecSpec("rotated", 1), CodecSpec("rotated", 2)) is None
    assert rescaled(1.0, CodecSpec("mask"), CodecSpec("integer", 8)) is None
