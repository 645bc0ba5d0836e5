"""Triton returns the reference's bits on many random tensors per codec, of odd sizes, strides and contents.

The interpreter takes 0.1 s for each: a thousand per codec, with ``ACTMEM_SHAPES=1000``, take a quarter of an hour.
"""

from __future__ import annotations

import os

import pytest
import torch

from lightning_actmem_kernels import CodecSpec, Layout, decode, encode
from lightning_actmem_kernels.spec import GROUP_SIZES, ROUNDINGS, WIDTHS

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(codec, bits) for codec, widths in WIDTHS.items() if codec not in ("identity", "integer") for bits in widths]
RANGES = ((0.0, 1.0), (-0.129, 1.129), (-3e4, 0.1))  # of the codec "fixed"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = int(os.environ.get("ACTMEM_SHAPES", "100"))
# Overflow and NaN are among the cases; the interpreter computes in numpy, which reports them.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

CONTENTS = (
    lambda x: x,
    lambda x: x * 1e-39,  # denormal
    lambda x: x * 1e30,
    lambda x: torch.where(x > 1.5, torch.nan, x),
    lambda x: torch.where(x > 2.0, torch.inf, x),
    lambda x: torch.where(x < -2.0, -torch.inf, x),
    lambda x: x.relu(),
    lambda x: torch.full_like(x, 0.3),  # constant
    lambda x: torch.zeros_like(x),
    lambda x: x + 1000.0,
)
# Dense in another order, with gaps, expanded, and plain.
STRIDES = (
    lambda x: x,
    lambda x: x.transpose(0, 1),
    lambda x: x.permute(2, 0, 1),
    lambda x: x[:, ::2],
    lambda x: x[:, :, :1].expand(-1, -1, 3),
    lambda x: x[1:],
)


def _pick(choices, random):
    return choices[int(torch.randint(len(choices), (), generator=random))]


def _tensor(codec, random):
    shape = torch.randint(1, 14, (3,), generator=random).tolist()
    x = torch.randn(shape, generator=random)
    if codec == "mask":
        return _pick(STRIDES, random)(x > 0)
    x = (x > 0) * 1.25 if codec == "two_valued" else _pick(CONTENTS, random)(x)
    return _pick(STRIDES, random)(x.to(_pick(FLOATS, random)))


def _spec(codec, bits, random):
    centre = codec == "rotated" and _pick((False, True), random)
    group_size, rounding = _pick(GROUP_SIZES, random), _pick(ROUNDINGS, random)
    low, high = _pick(RANGES, random) if codec == "fixed" else RANGES[0]
    return CodecSpec(codec, bits, group_size, rounding, centre, low, high)


def _bits(t):
    """The bytes of a tensor, with one pattern for every NaN."""
    t = t.cpu()
    if t.is_floating_point():
        t = torch.where(t.isnan(), torch.nan, t).contiguous()
    return t.view(torch.uint8)


@pytest.mark.parametrize(("codec", "bits"), CASES)
def test_many_shapes(codec, bits):
    random = torch.Generator().manual_seed(bits)
    for key in range(-(-SHAPES // len(WIDTHS[codec]))):
        x, spec = _tensor(codec, random), _spec(codec, bits, random)
        layout = Layout.of(x)
        flat = layout.flatten(x)
        case = f"{spec} {x.dtype} size {tuple(x.shape)} stride {x.stride()} key {key}"
        wanted = encode(flat, spec, key=key, backend="torch")
        payload = encode(flat.to(DEVICE), spec, key=key, backend="triton")
        restored = {"numel": flat.numel(), "dtype": flat.dtype, "key": key}
        back = decode(payload, spec, backend="triton", **restored)
        pairs = [*zip(payload, wanted, strict=True), (back, decode(wanted, spec, backend="torch", **restored))]
        assert all(torch.equal(_bits(a), _bits(b)) for a, b in pairs), case
        assert layout.unflatten(back).stride() == x.stride(), case
