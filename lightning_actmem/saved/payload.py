"""Encoded memory segments, shared by the handles of all their views."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec, decode

from .ledger import Charge

#: Quality of what comes back exactly, and of what is computed again from that: exact but for the order of additions.
EXACT_BITS = 32
DERIVED_BITS = 31


class Payload:
    """One encoded memory segment; the handles of all its views share it.

    Args:
        tensors: What the codec returned.
        spec: The codec.
        numel: Elements of the segment.
        dtype: Type of the elements.
        key: Noise key of the encoding.
        backend: Kernel backend, or ``None`` for the fastest.
        cache: Remembers the last decoded segments.
        charges: Bytes that are alive as long as this payload.
    """

    __slots__ = (
        "__weakref__",
        "_backend",
        "_charges",
        "_key",
        "bits",
        "cache",
        "dtype",
        "numel",
        "spec",
        "tensors",
        "uses",
    )

    depth = 0

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        spec: CodecSpec,
        numel: int,
        dtype: torch.dtype,
        key: int,
        backend: str | None,
        cache: DecodeCache,
        charges: tuple[Charge | None, ...],
    ) -> None:
        self.tensors = tensors
        self.spec = spec
        self.bits = EXACT_BITS if spec.lossless else spec.bits
        self.uses = 0
        self.numel = numel
        self.cache = cache
        self.dtype = dtype
        self._key = key
        self._backend = backend
        self._charges: tuple[object, ...] = charges

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        return decode(self.tensors, self.spec, numel=self.numel, dtype=self.dtype, key=self._key, backend=self._backend)


class AnyPayload(Protocol):
    """A memory segment that can be had: decoded (`Payload`) or computed (`Derived`).

    Attributes:
        numel: Elements of the segment.
        bits: Least bits that anything behind it was stored at; `EXACT_BITS` if it comes back exactly.
        depth: Operations that run to get it.
        uses: Handles of it that are alive.
        cache: Remembers the last segments.
    """

    numel: int
    bits: int
    depth: int
    uses: int
    cache: DecodeCache

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        ...


# With fewer handles alive, remembering a segment costs more peak memory than decoding it again costs time: the input of
# an activation is asked for twice, once to derive its output.
_USES_OF_DERIVED = 2
_USES_OF_STORED = 3


class DecodeCache:
    """The last few segments that backward has asked for, while somebody may ask again.

    Consumers of one tensor follow each other in backward (three projections of one norm's output), and so do the
    operations of a chain that is derived from one tensor.

    Args:
        capacity: How many decoded segments to hold at most: what backward's peak memory grows by.
    """

    def __init__(self, capacity: int = 2) -> None:
        self._capacity = capacity
        self._segments: OrderedDict[int, tuple[ReferenceType[AnyPayload], Tensor, int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._segments)

    def clear(self) -> None:
        """Forget every segment: what payloads return is about to change."""
        self._segments.clear()

    def decode(self, payload: AnyPayload) -> Tensor:
        """Return a payload's segment, decoded now or lately."""
        number = id(payload)
        entry = self._segments.get(number)
        if entry is not None:
            _, segment, version, stream = entry
            if segment._version == version and stream == _stream(segment):  # unchanged, and ready for who asks
                return segment
        if payload.uses < (_USES_OF_DERIVED if payload.depth else _USES_OF_STORED):
            return payload.decode()
        known = set(self._segments)
        segment = payload.decode()
        if payload.depth:  # the earlier parts of its chain will be asked for only when it is no longer needed
            for inner in self._segments.keys() - known:
                self._segments.pop(inner, None)
        forget = ref(payload, lambda _: self._segments.pop(number, None))
        self._segments[number] = forget, segment, segment._version, _stream(segment)
        while len(self._segments) > self._capacity:
            self._segments.popitem(last=False)
        return segment


def _stream(tensor: Tensor) -> int:
    """Return the identity of the current stream of the tensor's device: work on another one may not see it yet."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0
