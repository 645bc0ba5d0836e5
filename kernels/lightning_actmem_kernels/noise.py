"""Counter-based noise: 8 random bits per element, the same in torch and in Triton.

Philox4x32-7 turns the index of a group and a 64-bit key into four random words (a0, c0, a1, c1), so any group can be
regenerated alone and nothing is stored. The words of the group follow by multiply-add, for sub-block s = 0 to 7 and
i = 0 to G/32 - 1, modulo 2**32:

    x(s, i) = a + c * U(i) * V(s % 4)   with (a, c) = (a0, c0) for s < 4, else (a1, c1);   w = x ^ (x >> 16)

Element s * G/8 + 4i + b of the group draws byte b of w(s, i). Each byte is uniform and any two are independent,
exactly, over random a and c: the difference c * (T - T') of two words is uniform above the lowest 16 bits, since no two
factors T = U(i) * V(s) agree in their low 16 bits, and the shift brings those high bits to the low bytes. So any
weighted sum of errors has the variance of independent ones, at an eighth of what Philox for every element costs a CPU.
Eight bits suffice: the mean rounding bias stays below 4e-6 step. Seven rounds of Philox pass TestU01's BigCrush.

Random signs take 1 bit per element from Philox itself, with counter word 2 set to 1: the sign of element j of group g
is bit `j // (G/8)` of the byte with index `g * (G/8) + j % (G/8)`, 16 bytes to a block.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2; Dietzfelbinger, "Universal
hashing and k-wise independent random variables via integer arithmetic without primes", STACS 1996.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIER_A = 0xD2511F53
MULTIPLIER_B = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
MASK_32 = 0xFFFFFFFF
SIGN_STREAM = 1
GROUPS_AT_ONCE = 1 << 15

# Arbitrary odd numbers for which no two factors U(i) * V(s) agree in 16 bits, up to groups of 1024 (a test checks it).
COLUMN_MULTIPLIER = 0x9E3779B1
PLANE_MULTIPLIERS = (0x3CEB3FFD, 0x97B75093, 0x8B529B4B, 0x21636369)


def philox(index: Tensor, key: int, stream: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Philox4x32-7 block per counter (low half of index, high half of index, stream, 0).

    Args:
        index: int64 [m], the 64-bit counters.
        key: 64-bit key, signed or unsigned.
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


def group_words(key: int, first_group: int, groups: int, device: torch.device) -> Tensor:
    """The words a0, c0, a1, c1 of consecutive groups, from which their noise follows.

    Args:
        key: 64-bit key of the tensor's noise stream.
        first_group: Index of the first group.
        groups: Number of groups R.
        device: Where to compute.

    Returns:
        int32 [R, 4].
    """
    index = torch.arange(first_group, first_group + groups, device=device)
    return torch.stack(philox(index, key), 1).to(torch.int32)


def words_by_chunk(
    key: int, chunks: Iterable[tuple[int, int]], device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """Ranges [first, last) of consecutive groups, each with its `group_words`.

    The words of many chunks are computed at once: for few groups the time goes to some hundred torch calls.
    """
    words, start = torch.empty(0, 4, dtype=torch.int32, device=device), 0
    ranges = list(chunks)
    for first, last in ranges:
        if last > start + len(words):
            end = min(ranges[-1][1], max(last, first + GROUPS_AT_ONCE))
            words, start = group_words(key, first, end - first, device), first
        yield first, last, words[first - start : last - start]


def noise_of(words: Tensor, group_size: int) -> Tensor:
    """Random bytes of groups.

    Args:
        words: int32 [R, 4], from `group_words`.
        group_size: Elements per group G.

    Returns:
        uint8 [R, G].
    """
    pairs = words.view(-1, 2, 2, 1)
    # int32 arithmetic wraps, which is the arithmetic modulo 2**32.
    x = pairs[:, :, 1:] * torch.tensor(factors(group_size), dtype=torch.int32, device=words.device).view(1, 1, 4, -1)
    x = x.add_(pairs[:, :, :1])
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).view(torch.uint8).view(-1, group_size)


def noise_bytes(key: int, first_group: int, groups: int, group_size: int, device: torch.device) -> Tensor:
    """Random bytes of consecutive groups: arguments as for `group_words` and `noise_of`, uint8 [R, G]."""
    return noise_of(group_words(key, first_group, groups, device), group_size)


@lru_cache
def factors(group_size: int) -> tuple[int, ...]:
    """The factors U(i) * V(s) of a group, s = 0 to 3 and i = 0 to G/32 - 1, as signed 32-bit integers."""
    columns = [(i + 1) * COLUMN_MULTIPLIER & MASK_32 for i in range(group_size // 32)]
    products = [(x ^ x >> 15) * multiplier & MASK_32 for multiplier in PLANE_MULTIPLIERS for x in columns]
    return tuple((product ^ 1 << 31) - (1 << 31) for product in products)


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
