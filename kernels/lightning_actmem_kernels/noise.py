"""Counter-based noise: 8 random bits per element from Philox4x32-7, the same in torch and in Triton.

Element j of group g draws one byte of the block with counter `g * (G/16) + j % (G/16)` under a 64-bit key, so any part
of a tensor can be regenerated alone and nothing is stored. With `j // (G/16) = 2s + h` it is byte `s % 2 + 2 (s // 4)`,
little end first, of word `2h + s % 4 // 2`: codes s and s + 4 of a column find theirs in the two halves of one word.
Eight bits suffice: the mean rounding bias stays below 4e-6 step. Seven rounds pass TestU01's BigCrush.

Random signs take 1 bit per element from a stream of their own, with counter word 2 set to 1: the sign of element j of
group g is bit `j // (G/8)` of the byte with index `g * (G/8) + j % (G/8)`, 16 bytes to a block.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIER_A = 0xD2511F53
MULTIPLIER_B = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
MASK_32 = 0xFFFFFFFF
SIGN_STREAM = 1


def philox(index: Tensor, key: int | Tensor, stream: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Philox4x32-7 block per counter (low half of index, high half of index, stream, 0).

    Args:
        index: int64 [m], the 64-bit counters.
        key: 64-bit key, signed or unsigned; an int64 tensor without dimensions where code is compiled for any key.
        stream: Counter word 2: another one gives independent numbers under the same key.

    Returns:
        Words 0 to 3, each int64 [m]. Only the low 32 bits are random; above them words 1 and 3 carry leftovers of the
        arithmetic, for the caller to cut off.
    """
    c0, c1 = index & MASK_32, index >> 32
    c2, c3 = torch.full_like(index, stream), torch.zeros_like(index)
    k0, k1 = key & MASK_32, (key >> 32) & MASK_32
    for _ in range(ROUNDS):
        low, high = c2 * MULTIPLIER_B, c0 * MULTIPLIER_A
        # In place, since allocation counts at this size. The mask also drops the leftovers of c1 and c3.
        torch.bitwise_right_shift(low, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(MASK_32)
        torch.bitwise_right_shift(high, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(MASK_32)
        c1, c3 = low, high
        k0, k1 = (k0 + WEYL_0) & MASK_32, (k1 + WEYL_1) & MASK_32
    return c0, c1, c2, c3


def noise_bytes(
    key: int | Tensor, first_group: int | Tensor, groups: int, group_size: int, device: torch.device
) -> Tensor:
    """Random bytes of consecutive groups.

    Args:
        key: 64-bit key of the tensor's noise stream.
        first_group: Index of the first group.
        groups: Number of groups R.
        group_size: Elements per group G.
        device: Where to compute.

    Returns:
        int32 [R, G], from 0 to 255.
    """
    columns = group_size // 16
    index = torch.arange(groups * columns, device=device).add_(first_group * columns)
    w0, w1, w2, w3 = (word.view(groups, columns).to(torch.int32) for word in philox(index, key))
    # Word 2h + w, byte 2t + b of a block: element (4t + 2w + b, h) of 8 sub-blocks in halves.
    words = torch.stack((w0, w2, w1, w3), 1).view(groups, 1, 2, 1, 2, columns)
    shifts = torch.tensor(((0, 8), (16, 24)), dtype=torch.int32, device=device).view(2, 1, 2, 1, 1)
    return (words >> shifts).bitwise_and_(0xFF).view(groups, group_size)


def uniform_noise(key: int, first_group: int, groups: int, group_size: int, device: torch.device) -> Tensor:
    """Noise u = (byte + 1/2) / 256 of consecutive groups: arguments as for `noise_bytes`, float32 [R, G] in (0, 1)."""
    drawn = noise_bytes(key, first_group, groups, group_size, device)
    return drawn.to(torch.float32).add_(0.5).mul_(1 / 256)


def sign_bytes(key: int, first_group: int, groups: int, group_size: int, device: torch.device) -> Tensor:
    """Random signs of consecutive groups, 8 to a byte.

    Args:
        key: 64-bit key of the tensor's noise stream.
        first_group: Index of the first group.
        groups: Number of groups R.
        group_size: Elements per group G.
        device: Where to compute.

    Returns:
        uint8 [R, G/8]; bit s of column c belongs to element s * G/8 + c.
    """
    columns = group_size // 8
    first, last = first_group * columns, (first_group + groups) * columns
    index = torch.arange(first // 16, -(-last // 16), device=device)
    words = torch.stack(philox(index, key, SIGN_STREAM), 1).to(torch.int32)
    skipped = first % 16
    return words.view(torch.uint8).view(-1)[skipped : skipped + last - first].view(groups, columns)
