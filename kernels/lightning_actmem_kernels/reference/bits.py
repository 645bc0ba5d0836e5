"""Packing of b-bit codes into bytes, shared by the codecs that have groups.

A group of G codes is 8 sub-blocks of C = G/8 columns; code j = s*C + c. The 8 codes of column c form a word of 8b bits
with code s at bit b*s, and byte p of that word lands in row p. So each column packs alone, whatever b is, and rows
stay contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Pack codes below 2**bits.

    Args:
        codes: uint8 [R, G].
        bits: Bits per code b.
        out: uint8 [R, b, G/8], written to.
    """
    planes = codes.view(codes.shape[0], 8, -1)
    if 8 % bits:
        return _pack_straddling(planes, bits, out)
    per_byte = 8 // bits
    planes = planes.view(codes.shape[0], bits, per_byte, -1)
    out.copy_(planes[:, :, 0])
    for place in range(1, per_byte):
        out.bitwise_or_(planes[:, :, place] << bits * place)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that `pack` was given.

    Args:
        packed: uint8 [R, b, G/8].
        bits: Bits per code b.

    Returns:
        uint8 [R, G], newly allocated.
    """
    groups, _, columns = packed.shape
    planes = packed.new_empty(groups, 8, columns)
    if 8 % bits:
        _unpack_straddling(packed, bits, planes)
    else:
        per_byte = 8 // bits
        by_byte = planes.view(groups, bits, per_byte, columns)
        for place in range(per_byte):
            torch.bitwise_right_shift(packed, bits * place, out=by_byte[:, :, place])
        if per_byte > 1:
            planes.bitwise_and_((1 << bits) - 1)
    return planes.view(groups, -1)


def _pack_straddling(planes: Tensor, bits: int, out: Tensor) -> None:
    # Codes of 3 bits cross byte borders: build the 24-bit word of each column, then cut it.
    word = planes[:, 0].to(torch.int32)
    for s in range(1, 8):
        word.bitwise_or_(planes[:, s].to(torch.int32) << bits * s)
    for p in range(bits):
        out[:, p] = word >> 8 * p


def _unpack_straddling(packed: Tensor, bits: int, planes: Tensor) -> None:
    word = packed[:, 0].to(torch.int32)
    for p in range(1, bits):
        word.bitwise_or_(packed[:, p].to(torch.int32) << 8 * p)
    for s in range(8):
        planes[:, s] = (word >> bits * s).bitwise_and_((1 << bits) - 1)
