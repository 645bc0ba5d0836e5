"""Segments that move to a host by a transport that takes its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_actmem.saved.ledger import Charge, Ledger
from lightning_actmem.saved.offload import Offload
from lightning_actmem.saved.parcel import Movable
from lightning_actmem.saved.payload import DecodeCache
from lightning_actmem_kernels import CodecSpec
from tests.saved.slow_transport import SlowTransport

PARCEL = 4096


SEGMENT = 1024


UNDER_WAY = 2


class Bench:
    """An offload with segments that hold their number."""

    def __init__(self, limit_bytes: int = 0, transport: SlowTransport | None = None, **fields: Any) -> None:
        self.ledger = Ledger()
        self.transport = SlowTransport() if transport is None else transport
        settings = {"parcel_bytes": PARCEL, "under_way": UNDER_WAY, "least_bytes": 256, **fields}
        self.offload = Offload(self.ledger, limit_bytes, self.transport, **settings)
        self.segments: list[Movable | None] = []

    def store(self, count: int = 1, nbytes: int = SEGMENT, dtype: torch.dtype = torch.float32) -> None:
        for _ in range(count):
            values = torch.full((nbytes // dtype.itemsize,), len(self.segments) + 1).to(dtype)
            self.segments.append(self.segment((values,)))

    def segment(self, tensors: tuple[Tensor, ...]) -> Movable:
        nbytes = sum(tensor.nbytes for tensor in tensors)
        charges = (Charge(self.ledger, saved_bytes=nbytes),)
        numel, dtype = tensors[0].numel(), tensors[0].dtype
        spec = CodecSpec("identity")
        segment = Movable(self.offload, nbytes, tensors, spec, numel, dtype, 0, None, DecodeCache(), charges)
        self.offload.add(segment)
        return segment

    def read(self, number: int) -> None:
        """Assert that a segment comes back as it was."""
        segment = self.segments[number]
        assert segment is not None
        values = segment.decode()
        assert torch.equal(values, torch.full_like(values, number + 1))

    def read_and_free(self, number: int) -> None:
        self.read(number)
        self.segments[number] = None

    def where(self) -> str:
        """One letter for each segment: on the ``d``evice, ``b``oth, ``h``ost, or gone (``-``)."""
        return "".join("-" if segment is None else _where(segment) for segment in self.segments)

    def live(self) -> tuple[int, int]:
        """Bytes on the device and on the host now."""
        self.ledger.settle()
        places = self.ledger.whereabouts
        assert places is not None
        return places.device_bytes(self.ledger.live_saved_bytes), places.live_host_bytes

    def peak_device_bytes(self) -> int:
        places = self.ledger.whereabouts
        assert places is not None
        return places.peak_device_bytes(self.ledger.live_saved_bytes)


def _where(segment: Movable) -> str:
    if segment.parcel is None:
        return "d"
    return "h" if segment.parcel.transfer is None else "b"


def in_backward(*actions: Callable[[], object]) -> None:
    """Run each action within a backward pass of its own."""
    for action in actions:
        x = torch.ones(1, requires_grad=True)
        y = x * 1
        y.register_hook(lambda _, action=action: action() and None)
        y.backward()


def down(bench: Bench, *, free: bool = True) -> Callable[[], None]:
    """Read every segment, the last one first, as backward does."""

    def run() -> None:
        for number in reversed(range(len(bench.segments))):
            if bench.segments[number] is not None:
                (bench.read_and_free if free else bench.read)(number)

    return run


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.integers(64, 6000)),
        st.tuples(st.sampled_from(["read", "free", "down", "stream", "step", "end"]), st.integers(0, 99)),
    ),
    min_size=8,
    max_size=60,
)
