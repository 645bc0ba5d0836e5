"""Integer narrowing is lossless up to its bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import CodecSpec, decode, encode, integer_bits

CASES = [
    (bits, dtype)
    for bits in (8, 16, 32)
    for dtype in (torch.int16, torch.int32, torch.int64)
    if bits <= 8 * dtype.itemsize
]


def _round_trip(x, bits):
    spec = CodecSpec("integer", bits)
    payload = encode(x, spec, key=0)
    back = decode(payload, spec, numel=x.numel(), dtype=x.dtype, key=0)
    assert back.dtype == x.dtype
    assert torch.equal(back, x)
    assert back.untyped_storage().data_ptr() != payload[0].untyped_storage().data_ptr() or not x.numel()


@pytest.mark.parametrize(("bits", "dtype"), CASES)
def test_lossless_at_the_ends(bits, dtype):
    top = min(2**bits, 2 ** (8 * dtype.itemsize - 1)) - 1
    _round_trip(torch.tensor([0, 1, 127, top // 2, top // 2 + 1, top - 1, top], dtype=dtype).clamp_(max=top), bits)
    _round_trip(torch.empty(0, dtype=dtype), bits)


@given(st.sampled_from(CASES), st.data())
def test_lossless(case, data):
    bits, dtype = case
    top = min(2**bits, 2 ** (8 * dtype.itemsize - 1)) - 1
    _round_trip(torch.tensor(data.draw(st.lists(st.integers(0, top), max_size=40)), dtype=dtype), bits)


@pytest.mark.parametrize(
    ("bound", "bits"),
    [(1, 8), (256, 8), (257, 16), (65536, 16), (65537, 32), (2**32, 32), (2**32 + 1, None)],
)
def test_integer_bits(bound, bits):
    assert integer_bits(bound) == bits


def test_widening_is_refused():
    with pytest.raises(TypeError, match=r"at 32 bits would widen torch\.int16\. Use at most 16 bits"):
        encode(torch.zeros(3, dtype=torch.int16), CodecSpec("integer", 32), key=0)
