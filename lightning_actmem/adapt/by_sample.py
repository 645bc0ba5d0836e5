"""Bits for single samples, as ActNN gives them: more to those whose values span a wider range.

A tensor with b bits per element on average is min-max groups with stochastic rounding at widths b_n of its samples:
``min sum_n w_n / (2^(b_n) - 1)^2`` subject to ``sum_n b_n <= N b``, where ``w_n`` is the sum of the squared ranges of
sample n's groups. The widths are found on the host, which waits for the device: one reason why nothing but the
comparison stores by samples.

Source: Chen et al., "ActNN: reducing training memory footprint via 2-bit activation compressed training", ICML 2021
(section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec

from ..saved.payload import AnyPayload, DecodeCache
from ..saved.store import Encode

WIDTHS = (1, 2, 3, 4, 8)


def by_sample(
    flat: Tensor, spec: CodecSpec, size: tuple[int, ...], encode_as: Callable[[torch.dtype], Encode]
) -> tuple[AnyPayload, int] | None:
    """Store a tensor in as many bytes as its codec takes, or fewer, with widths by sample.

    Args:
        flat: The tensor's elements in memory order, a sample after the other.
        spec: The codec of the tensor as a whole.
        size: Shape of the tensor; the first dimension counts samples.
        encode_as: Returns what encodes elements of a type, with noise not used before.

    Returns:
        What stands for the tensor, and the bytes stored. ``None`` if its codec is another or leaves no choice, there
        is one sample, or a sample has less than a group.
    """
    samples = size[0] if size else 1
    if spec.codec != "uniform" or spec.bits == WIDTHS[-1] or samples < 2 or flat.numel() // samples < spec.group_size:
        return None
    rows = flat.view(samples, -1)
    order_spec = CodecSpec("integer", 16 if samples <= 1 << 15 else 32)
    order_bytes = order_spec.stored_bytes(samples, torch.int64)
    spare = spec.stored_bytes(flat.numel(), flat.dtype) - order_bytes
    widths = sample_bits(_weights(rows, spec.group_size), spec, rows.shape[1], flat.dtype, spare)
    if widths is None:
        return None
    order = widths.argsort(stable=True)
    counts = [int((widths == bits).sum()) for bits in WIDTHS]
    pieces: list[AnyPayload] = []
    total = 0
    for bits, chosen in zip(WIDTHS, order.split(counts), strict=True):
        if len(chosen):
            piece, piece_bytes = encode_as(flat.dtype)(
                rows.index_select(0, chosen.to(rows.device)).view(-1), replace(spec, bits=bits)
            )
            pieces.append(piece)
            total += piece_bytes
    order_payload, stored = encode_as(torch.int64)(order.to(flat.device), order_spec)
    return _BySample(pieces, order_payload, flat.numel(), spec.bits), total + stored


def sample_bits(weights: Tensor, spec: CodecSpec, length: int, dtype: torch.dtype, max_bytes: int) -> Tensor | None:
    """Choose a width for every sample: the least sum of ``w_n / (2^(b_n) - 1)^2`` within some bytes.

    Args:
        weights: w_n, of shape (N,), on the CPU.
        spec: The codec at any width.
        length: Elements of a sample.
        dtype: Their type.
        max_bytes: The bytes.

    Returns:
        The widths, of shape (N,); ``None`` if not even 1 bit for each fits.
    """
    samples = len(weights)
    # Samples of one width are encoded one behind the other, in groups that may span two: only the last may be short.
    sizes = [spec_at.stored_bytes(samples * length, dtype) / samples for spec_at in _at_widths(spec)]
    short = [spec_at.stored_bytes(spec.group_size, dtype) for spec_at in _at_widths(spec)]
    slack = sum(short) if length % spec.group_size else 0
    steps = torch.tensor([1 / (2**low - 1) ** 2 - 1 / (2**high - 1) ** 2 for low, high in pairwise(WIDTHS)])
    costs = torch.tensor([high - low for low, high in pairwise(sizes)], dtype=torch.float64)
    left = max_bytes - slack - samples * sizes[0]
    if left < 0:
        return None
    gains = weights.double()[:, None] * (steps / costs)
    ranked = gains.flatten().argsort(descending=True, stable=True)  # of one sample the first step gains most
    spent = costs.repeat(samples)[ranked].cumsum(0)
    taken = torch.zeros(samples * len(steps), dtype=torch.bool)
    taken[ranked[spent <= left]] = True
    return torch.tensor(WIDTHS)[taken.view(samples, -1).sum(1)]


class _BySample:
    """Stands for a `Payload`: one for the samples of each width, and their order."""

    __slots__ = ("__weakref__", "_order", "_pieces", "bits", "cache", "depth", "numel", "uses")

    def __init__(self, pieces: list[AnyPayload], order: AnyPayload, numel: int, bits: int) -> None:
        self._pieces = pieces
        self._order = order
        self.numel = numel
        self.bits = bits
        self.depth = 0
        self.uses = 0
        self.cache: DecodeCache = order.cache

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        order = self._order.decode()
        rows = torch.cat([piece.decode() for piece in self._pieces]).view(len(order), -1)
        return torch.empty_like(rows).index_copy_(0, order, rows).view(-1)


def _at_widths(spec: CodecSpec) -> list[CodecSpec]:
    return [replace(spec, bits=bits) for bits in WIDTHS]


def _weights(rows: Tensor, group_size: int) -> Tensor:
    """Return the sum of the squared ranges of every row's whole groups, on the CPU."""
    groups = rows[:, : rows.shape[1] // group_size * group_size].float().view(len(rows), -1, group_size)
    return (groups.amax(2) - groups.amin(2)).square().sum(1).cpu()
