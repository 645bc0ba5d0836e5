"""Packing of b-bit codes into bytes, shared by the codecs that have groups.

A group of G codes is 8 sub-blocks of C = G/8 columns; code j = s*C + c. The 8 codes of column c form a word of 8b bits
with code s at bit b*s, and byte p of that word lands in row p. So each column packs alone, whatever b is, and rows
stay contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below 2**bits.

    Args:
        codes: uint8 [R, G].
        bits: Bits per code b.

    Returns:
        uint8 [R, b, G/8], newly allocated.
    """
    planes = codes.view(codes.shape[0], 8, -1)
    if 8 % bits:
        return _pack_straddling(planes, bits)
    per_byte = 8 // bits
    planes = planes.view(codes.shape[0], bits, per_byte, -1)
    packed = planes[:, :, 0].clone()
    for place in range(1, per_byte):
        packed.bitwise_or_(planes[:, :, place] << bits * place)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that `pack` was given.

    Args:
        packed: uint8 [R, b, G/8].
        bits: Bits per code b.

    Returns:
        uint8 [R, G], newly allocated.
    """
    if 8 % bits:
        return _unpack_straddling(packed, bits).view(packed.shape[0], -1)
    if torch.compiler.is_compiling():
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(1)
        planes = packed.unsqueeze(2) >> places
    else:
        # A tensor of shifts is slower, 9 instead of 5 ms for 16 million codes, but the compiler takes no `out`.
        planes = packed.new_empty(packed.shape[0], bits, 8 // bits, packed.shape[2])
        for place in range(8 // bits):
            torch.bitwise_right_shift(packed, bits * place, out=planes[:, :, place])
    return planes.bitwise_and_((1 << bits) - 1).view(packed.shape[0], -1)


def _pack_straddling(planes: Tensor, bits: int) -> Tensor:
    # Codes cross byte borders: what a shift takes out of a byte belongs to its neighbour. Twice as fast as words of a
    # column, and with every sub-block in one piece as with rows of G/8 bytes.
    blocks = planes.transpose(0, 1).contiguous()
    rows = []
    for p in range(bits):
        first, last = 8 * p // bits, (8 * p + 7) // bits
        row = _shifted(blocks[first], bits * first - 8 * p)
        for s in range(first + 1, last + 1):
            row.bitwise_or_(_shifted(blocks[s], bits * s - 8 * p))
        rows.append(row)
    return torch.stack(rows, 1)


def _unpack_straddling(packed: Tensor, bits: int) -> Tensor:
    rows = packed.transpose(0, 1).contiguous()
    planes = []
    for s in range(8):
        p, place = divmod(bits * s, 8)
        code = _shifted(rows[p], -place)
        if place + bits > 8:
            code.bitwise_or_(_shifted(rows[p + 1], 8 - place))
        planes.append(code.bitwise_and_((1 << bits) - 1))
    return torch.stack(planes, 1)


def _shifted(x: Tensor, left: int) -> Tensor:
    """Bytes shifted to the left, or to the right where ``left`` is negative; a new tensor."""
    return x << left if left >= 0 else x >> -left
