"""Packing of codes into bytes, against the definition one code at a time."""

from __future__ import annotations

import pytest
import torch

from lightning_actmem_kernels.reference.bits import pack, unpack

BITS = (1, 2, 3, 4, 5, 6, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 1024])
def test_layout_and_round_trip(bits, group_size):
    columns = group_size // 8
    codes = torch.randint(0, 1 << bits, (3, group_size), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, bits, columns)
    for r in range(3):
        for c in range(columns):
            word = sum(int(codes[r, s * columns + c]) << bits * s for s in range(8))
            assert packed[r, :, c].tolist() == [word >> 8 * p & 0xFF for p in range(bits)]
    assert torch.equal(unpack(packed, bits), codes)
