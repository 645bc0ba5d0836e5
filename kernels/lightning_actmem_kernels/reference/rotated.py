"""Randomly rotated groups, quantised to the Lloyd-Max levels of a normal distribution, restored without bias.

For a group x of G elements with random signs d, the Hadamard matrix H (entries +-1), and z = H (d * x):
    encode: q_i = index of the level l(q_i) nearest to z_i / rms(z);  S = |z|^2 / (G <z, l(q)>), rounded to bfloat16
    decode: S d * (H l(q))
The rotation makes any z nearly normal, so one table of levels serves every group; S makes the error orthogonal to x,
which the mean square error pays for with the factor 1 / (1 - mse). Optionally the mean of the group is kept apart, in
bfloat16.

float32 throughout, in this order, so that every backend gives the same bits: x is scaled by a power of two to a
maximum in [1, 2), the butterflies of H take strides G/2, G/4 and G/8, then 1, 2, 4 ... G/16, sums add halves of the 8
sub-blocks, then adjacent columns. A group that holds NaN, inf or a magnitude from 2**127 on decodes to NaN throughout.

Source: Vargaftik et al., "EDEN: communication-efficient and robust distributed mean estimation for federated learning",
ICML 2022; the levels: Lloyd, "Least squares quantization in PCM", 1982, and Max, 1960.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..noise import sign_bytes
from .bf16 import round_nearest
from .bits import pack, unpack
from .chunks import group_chunks, groups_of, load_groups, store
from .grouped import empty_codes
from .memory import empty

# Magnitudes of the levels for N(0, 1); a code is their index with the sign of z above it.
LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.797885,),
    2: (0.45278, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.94234, 1.256231, 1.618046, 2.069017, 2.73259),
}
# Half way between neighbours, squared: compared with z^2 / rms^2.
SQUARED_THRESHOLDS = {bits: tuple(((a + b) / 2) ** 2 for a, b in pairwise(levels)) for bits, levels in LEVELS.items()}
SIGN_BIT = -0x80000000
# From 2**127 on the mean of a group may round to infinity.
TOO_LARGE_BITS = 0x7F000000
NAN_BF16 = 0x7FC0


def encode(flat: Tensor, bits: int, group_size: int, centre: bool, key: int) -> tuple[Tensor, Tensor]:
    """Rotate and quantise a flat tensor.

    Args:
        flat: 1-D contiguous float32, bfloat16 or float16, n elements in N = ceil(n / G) groups, the last padded with 0.
        bits: Bits per code b, 1 to 4.
        group_size: Elements per group G.
        centre: Keep the mean of each group apart.
        key: 64-bit key of the noise stream.

    Returns:
        Codes, uint8 [N, b, G/8], and int16 [N, 1 + centre], the bits of bfloat16: scale S and, if asked for, the mean.
    """
    codes = empty_codes(flat, bits, group_size)
    scales = codes.new_empty(len(codes), 1 + centre, dtype=torch.int16)
    for first, last in group_chunks(flat.numel(), group_size, flat.device):
        # Groups in columns: every butterfly and every sum then runs along contiguous rows.
        x = (
            load_groups(flat, first, last, group_size, repeat_last=False)
            .t()
            .to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        )
        largest = torch.maximum(x.amax(0), x.amin(0).neg_()).view(torch.int32) & ~SIGN_BIT
        exponent = (largest >> 23).clamp_(1, 253)
        sound = largest < TOO_LARGE_BITS
        unit, shrink = (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)
        x.mul_(shrink)
        if centre:
            mean = torch.where(sound, round_nearest(_sum(x).mul_(1 / group_size).mul_(unit)), 0)
            scales[first:last, 1] = mean >> 16
            x.sub_(mean.view(torch.float32) * shrink)
        z = _hadamard(_flip(x, key, first))
        index, scale = _quantise(z, bits)
        scale = round_nearest(scale.mul_(unit)) >> 16
        scales[first:last, 0] = torch.where(sound, scale, NAN_BF16)
        # A group that is not finite stores zeros.
        packed = pack(index.view(1, -1), bits).view(bits, -1, last - first).mul_(sound)
        codes[first:last] = packed.permute(2, 0, 1)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, bits: int, key: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Restore what `encode` packed.

    Args:
        codes: uint8 [N, b, G/8].
        scales: int16 [N, 1] or [N, 2].
        bits: Bits per code b.
        key: As given to `encode`.
        numel: Elements n.
        dtype: float32, bfloat16 or float16.

    Returns:
        1-D tensor of n elements.
    """
    group_size = 8 * codes.shape[2]
    flat = empty(numel, dtype, codes.device)
    levels = torch.tensor(LEVELS[bits] + tuple(-level for level in LEVELS[bits]), device=codes.device)
    for first, last in group_chunks(numel, group_size, codes.device):
        packed = codes[first:last].permute(1, 2, 0).reshape(1, bits, -1)
        index = unpack(packed, bits).view(-1).to(torch.int32)
        x = _hadamard(levels.index_select(0, index).view(group_size, last - first))
        by_group = (scales[first:last].to(torch.int32) << 16).view(torch.float32)
        x = _flip(x.mul_(by_group[:, 0]), key, first)
        if scales.shape[1] == 2:
            x.add_(by_group[:, 1])
        with groups_of(flat, first, last, group_size) as out:
            store(x.t(), out)
    return flat


def _flip(x: Tensor, key: int, first: int) -> Tensor:
    """Apply the random signs to x [G, R], in place."""
    group_size, groups = x.shape
    flips = (
        sign_bytes(key, first, groups, group_size, x.device).t().to(torch.int32, memory_format=torch.contiguous_format)
    )
    for s, plane in enumerate(x.view(torch.int32).view(8, -1, groups)):
        plane.bitwise_xor_((flips << 31 - s).bitwise_and_(SIGN_BIT))
    return x


def _hadamard(x: Tensor) -> Tensor:
    """H x for x [G, R], which is overwritten."""
    columns = x.shape[0] // 8
    strides = [4 * columns, 2 * columns, columns]
    while len(strides) < x.shape[0].bit_length() - 1:
        strides.append(1 << len(strides) - 3)
    out = torch.empty_like(x)
    for stride in strides:
        a, b = x.view(-1, 2, stride, x.shape[1]).unbind(1)
        pairs = out.view(-1, 2, stride, x.shape[1])
        torch.add(a, b, out=pairs[:, 0])
        torch.sub(a, b, out=pairs[:, 1])
        x, out = out, x
    return x


def _sum(x: Tensor) -> Tensor:
    """Sum over the rows of x [G, R], in the order of the module's docstring."""
    columns = x.shape[0] // 8
    while x.shape[0] > columns:
        half = x.shape[0] // 2
        x = x[:half] + x[half:]
    while x.shape[0] > 1:
        x = x[::2] + x[1::2]
    return x[0]


def _quantise(z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [G, R], and scales in units of z, float32 [R], 0 for a group of zeros."""
    squares = z * z
    energy = _sum(squares)
    mean_square = energy * (1 / z.shape[0])
    index = torch.zeros(z.shape, dtype=torch.uint8, device=z.device)
    for threshold in SQUARED_THRESHOLDS[bits]:
        index.add_(squares > mean_square * threshold)
    levels = torch.tensor(LEVELS[bits], device=z.device).index_select(0, index.view(-1).to(torch.int32)).view(z.shape)
    inner = _sum(levels.mul_(z.abs()))
    scale = torch.where(inner > 0, energy / (inner * z.shape[0]), 0.0)
    negative = (z.view(torch.int32) < 0).to(torch.uint8)
    return index.add_(negative << bits - 1), scale
