"""An encoded segment and the handle of its tensor in one, the first that is stored of its storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_actmem_kernels import CodecSpec, Layout, decode

from .ledger import Charge, Ledger, SiteBytes
from .operation import OWN_DERIVATIVE
from .payload import EXACT_BITS, DecodeCache, Payload

if TYPE_CHECKING:
    from .handle import Kept


class PackedFirst(Payload):
    """A payload that is the first handle of itself, and holds the bytes of its storage until somebody else asks.

    Most of what is packed is saved once: payload, handle and charges of their own would be as much again of
    the hooks' work, and work for the garbage collector.

    Args:
        tensors: What the codec returned.
        spec: The codec.
        tensor: The tensor that autograd saves.
        layout: Its layout; dense, so that the segment is its memory from first to last element.
        key: Noise key of the encoding.
        backend: Kernel backend, or ``None`` for the fastest.
        cache: Remembers the last decoded segments.
        ledger: Where the bytes are booked.
        saved_bytes: Bytes of the payload.
        raw_bytes: Bytes of the tensor's storage, which plain autograd would keep alive.

    Attributes:
        version: Version of the storage's contents that it has.
        start: First element within the storage.
        row: Where its bytes are booked by site, if they are.
    """

    __slots__ = ("_exact", "_layout", "_ledger", "_raw", "_raw_bytes", "_saved_bytes", "row", "start", "version")

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        spec: CodecSpec,
        tensor: Tensor,
        layout: Layout,
        key: int,
        backend: str | None,
        cache: DecodeCache,
        ledger: Ledger,
        saved_bytes: int,
        raw_bytes: int,
    ) -> None:
        # As `Payload` does it, whose charges it has in numbers: to call that takes 0.2 us.
        self.tensors = tensors
        self.spec = spec
        self.bits = EXACT_BITS if spec.lossless else spec.bits
        self.uses = 1
        self.numel = layout.numel
        self.cache = cache
        self.dtype = tensor.dtype
        self._key = key
        self._backend = backend
        self.version = tensor._version
        self.start = int(tensor.storage_offset())
        self._layout = layout
        self._ledger = ledger
        self._raw: Charge | None = None
        self._exact: Kept | None = None
        self.row: SiteBytes | None = None
        self._saved_bytes = saved_bytes
        self._raw_bytes = raw_bytes
        if ledger._released:
            ledger.settle()
        ledger.live_saved_bytes += saved_bytes
        ledger.live_raw_bytes += raw_bytes

    @property
    def raw(self) -> Charge:
        """The charge for the bytes of the storage, which lives on with whoever else holds it."""
        if self._raw is None:
            self._raw = Charge(self._ledger)
            # It takes them over: nothing is booked, nothing released.
            self._raw.raw_bytes, self._raw_bytes = self._raw_bytes, 0
        return self._raw

    def give_way(self, kept: Kept) -> None:
        """Let go of the code of a sigmoid's result, or the like, where somebody keeps the result itself.

        A loss or a logarithm that follows divides by y, and the sigmoid's own y (1 - y) makes up for that only where it
        is the same y: rounded, it made the gradient of a binary cross-entropy hundreds of times too large.
        """
        row = self.row
        if row is None or row.site.role != "result" or row.site.operation not in OWN_DERIVATIVE:
            return
        if self._exact is not None or not kept.has(self.version, self.dtype):
            return
        self._exact, self.tensors, self.bits = kept, (), EXACT_BITS
        self.uses += 1  # `restore` is no longer to decode by itself
        row.take_back(self._saved_bytes, self._ledger)
        self._ledger._released.append((self._saved_bytes, 0, 0))
        self._saved_bytes = 0

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        return super().decode() if self._exact is None else self._exact.segment(self.start, self.numel)

    def restore(self) -> Tensor:
        """Return the tensor: same dtype, shape, strides and device as the one that was saved."""
        if self.uses > 1 or self.cache:
            return self._layout.unflatten(self.cache.decode(self))
        # Nobody else may ask, and nothing is remembered: as the cache does it.
        tensors, spec, layout = self.tensors, self.spec, self._layout
        return layout.unflatten(
            decode(tensors, spec, numel=layout.numel, dtype=self.dtype, key=self._key, backend=self._backend)
        )

    def __del__(self) -> None:
        self._ledger._released.append((self._saved_bytes, self._raw_bytes, 0))
