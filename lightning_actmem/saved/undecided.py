"""Inputs of batch norms: encoded once it is known whether a ReLU's exact sign is stored as well."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec, Layout

from .handle import Handle, Kept, Packed
from .ledger import Charge
from .payload import AnyPayload, DecodeCache
from .probe import ProbePayload
from .signed import Sign, Signed

# The shortcut and the body of a residual block end in a batch norm each, and one ReLU follows their sum.
_WAITING = 2
Encode = Callable[[Tensor, CodecSpec], tuple[AnyPayload, int]]


class Undecided:
    """Stands for a payload that is not encoded yet: the tensor itself, for the time being.

    Args:
        tensor: What autograd saves; it fills its memory.
        layout: Its layout.
        specs: The codec, and the one for when a ReLU's sign is there to multiply by.
        encode: Encodes a flat segment; returns the payload and its bytes.
        settled: Takes the codec and the bytes when they are known.
        held: Charge for the tensor's memory.
        cache: Remembers the last decoded segments.
    """

    __slots__ = (
        "__weakref__",
        "_encode",
        "_held",
        "_inner",
        "_kept",
        "_settled",
        "_specs",
        "_stream",
        "bits",
        "cache",
        "layout",
        "numel",
        "uses",
    )

    depth = 0

    def __init__(
        self,
        tensor: Tensor,
        layout: Layout,
        specs: tuple[CodecSpec, CodecSpec],
        encode: Encode,
        settled: Callable[[CodecSpec, int], None],
        held: Charge,
        cache: DecodeCache,
    ) -> None:
        self._kept: Kept | None = Kept(tensor)
        self.layout = layout
        self._specs = specs
        self._encode = encode
        self._settled = settled
        self._held: Charge | None = held
        self._stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        self._inner: AnyPayload | Signed | None = None
        self.bits = specs[0].bits
        self.cache = cache
        self.numel = layout.numel
        self.uses = 0

    def settle(self, sign: Sign | None = None) -> None:
        """Encode the tensor and let go of it; a tensor that has been changed in place stays, and is an error when used.

        Args:
            sign: The sign of a ReLU that follows, and is stored: the tensor then takes fewer bits.
        """
        if self._kept is None or self._kept.is_modified:
            return
        tensor = self._kept.restore()
        here = self._stream is None or self._stream == torch.cuda.current_stream(tensor.device)
        with contextlib.nullcontext() if here else torch.cuda.stream(self._stream), torch.no_grad():
            if sign is None or not here or sign.size != tensor.shape:
                spec = self._specs[0]
                self._inner, saved_bytes = self._encode(self.layout.flatten(tensor), spec)
            else:
                spec = self._specs[1]
                payload, saved_bytes = self._encode(self.layout.flatten(sign.fold(tensor)), spec)
                self._inner = Signed(payload, sign, self.layout)
        self._settled(spec, saved_bytes)
        self._kept = self._held = None

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        self.settle()
        if self._inner is None:
            assert self._kept is not None
            return self.layout.flatten(self._kept.restore())  # raises: it has been modified
        return self._inner.decode()


class Waiting:
    """The tensors that are not encoded yet, oldest first; they live as long as somebody holds a handle of them."""

    def __init__(self) -> None:
        self._waiting: deque[ReferenceType[Undecided | ProbePayload]] = deque()

    def add(self, undecided: Undecided | ProbePayload) -> None:
        """Wait for the ReLU of one more tensor."""
        self._waiting.append(ref(undecided))
        while len(self._waiting) > _WAITING:
            self._settle_oldest()

    def settle(self) -> None:
        """Wait no longer."""
        while self._waiting:
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        undecided = self._waiting.popleft()()
        if undecided is not None:
            undecided.settle()


def undecided_behind(handle: Handle) -> Undecided | ProbePayload | None:
    """Return what a handle's values wait for, if they do."""
    payload = getattr(handle, "payload", None)
    if not isinstance(payload, (Undecided, ProbePayload)) or not isinstance(handle, Packed):
        return None
    layout = payload.layout
    return payload if handle.shows(layout.size, layout.stride) else None
