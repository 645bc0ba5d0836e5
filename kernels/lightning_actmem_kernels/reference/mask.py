"""Booleans in one bit each, as 8 contiguous planes.

With B = ceil(n / 8), bit s of byte i is element s*B + i: packing and unpacking read and write whole planes in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 16


def encode(flat: Tensor) -> Tensor:
    """Pack a flat bool tensor.

    Args:
        flat: bool [n], contiguous.

    Returns:
        uint8 [ceil(n / 8)].
    """
    bools = flat.view(torch.uint8)
    packed = bools.new_empty(-(-bools.numel() // 8))
    for start in range(0, packed.numel(), CHUNK_BYTES):
        out = packed[start : start + CHUNK_BYTES]
        out.copy_(_plane(bools, packed.numel(), 0, start, out.numel()))
        for s in range(1, 8):
            plane = _plane(bools, packed.numel(), s, start, out.numel())
            out[: plane.numel()].bitwise_or_(plane << s)
    return packed


def decode(packed: Tensor, numel: int) -> Tensor:
    """Restore what `encode` packed.

    Args:
        packed: uint8 [ceil(n / 8)].
        numel: Elements n.

    Returns:
        bool [n].
    """
    bools = packed.new_empty(numel)
    for start in range(0, packed.numel(), CHUNK_BYTES):
        chunk = packed[start : start + CHUNK_BYTES]
        for s in range(8):
            plane = _plane(bools, packed.numel(), s, start, chunk.numel())
            torch.bitwise_right_shift(chunk[: plane.numel()], s, out=plane)
            plane.bitwise_and_(1)
    return bools.view(torch.bool)


def _plane(bools: Tensor, plane_size: int, s: int, start: int, length: int) -> Tensor:
    """Elements [start, start + length) of plane s; fewer, or none, where the tensor ends."""
    offset = s * plane_size + start
    return bools[offset : min(offset + length, (s + 1) * plane_size)]
