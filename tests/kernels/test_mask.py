"""Masks and two-valued tensors: one bit per element, lossless."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, decode, encode
from lightning_actmem_kernels.reference import mask

NUMELS = (0, 1, 7, 8, 9, 31, 255, 256, 257, 1009, 4097)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _round_trip(x, codec):
    spec = CodecSpec(codec)
    back = decode(encode(x, spec, key=0), spec, numel=x.numel(), dtype=x.dtype, key=0)
    assert back.dtype == x.dtype
    assert torch.equal(back, x)


@pytest.mark.parametrize("numel", NUMELS)
def test_mask_is_lossless(numel):
    _round_trip(torch.rand(numel) < 0.3, "mask")


@given(st.lists(st.booleans(), max_size=100))
def test_any_mask(bools):
    _round_trip(torch.tensor(bools, dtype=torch.bool), "mask")


def test_bit_planes():
    """Bit s of byte i is element s * B + i."""
    bools = torch.rand(83) < 0.5
    packed = mask.encode(bools)
    planes = 11
    assert packed.numel() == planes
    for element in range(83):
        assert bool(packed[element % planes] >> element // planes & 1) == bool(bools[element])


def test_chunking_changes_no_bit(monkeypatch):
    bools = torch.rand(4097) < 0.5
    whole = mask.encode(bools)
    monkeypatch.setattr(mask, "CHUNK_BYTES", 100)
    assert torch.equal(mask.encode(bools), whole)
    assert torch.equal(mask.decode(whole, 4097), bools)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_masks_are_lossless(p, dtype):
    for numel in NUMELS:
        kept = torch.rand(numel) >= p
        _round_trip((kept / (1 - p if p < 1 else 1)).to(dtype), "two_valued")


@given(st.lists(st.booleans(), max_size=50), st.floats(2**-14, 60000.0), st.sampled_from(FLOATS))
def test_any_two_values(kept, scale, dtype):
    _round_trip((torch.tensor(kept, dtype=torch.float64) * scale).to(dtype), "two_valued")
