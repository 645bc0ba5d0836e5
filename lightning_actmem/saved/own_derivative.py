"""Results that their own operation is differentiated by: encoded once it is clear that nothing divides by them.

A logarithm or a division that follows, through whatever additions and copies, makes the gradient large by 1 / y or
1 / (1 - y), and a sigmoid's own y (1 - y) makes up for that only where it is the same y. Rounded to 8 bits it made the
gradient of ``-log(1 - sigmoid(x) + 1e-8)`` a hundred times too large where most of the sigmoids had come near 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from lightning_actmem_kernels import CodecSpec, Layout

from .extent import fills
from .handle import Kept
from .ledger import Charge, Ledger
from .operation import PACKABLE
from .payload import EXACT_BITS, DecodeCache, Payload
from .undecided import Encode, Undecided

_EXACT = CodecSpec("identity")
# Two networks may have run before the loss of the first; no more, since each waits at its full size.
_CAPACITY = 2
_MAX_NODES = 32
# What comes out of these has a scale of its own, or that of the largest of many.
_ENDS = (
    *("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "Convolution", "Native", "Cudnn", "Embedding", "Scaled", "Fused"),
    *("Sum", "Mean"),
)


def may_divide(operation: str, kind: str) -> bool:
    """Whether an operation may divide by what it saves, or take its logarithm, from the verdict on what it saves."""
    return operation not in PACKABLE or kind in ("exact", "loss")


def may_wait(tensor: Tensor, layout: Layout, spec: CodecSpec) -> bool:
    """Whether a tensor can be found again from what follows, is all of its memory, and has a code that is smaller."""
    smaller = spec.stored_bytes(layout.numel, tensor.dtype) < tensor.nbytes
    return tensor.grad_fn is not None and fills(tensor, layout) and smaller


class OwnDerivative(Undecided):
    """Stands for a payload that is encoded later, or not at all.

    Args:
        tensor: What autograd saves; it fills its memory.
        layout: Its layout.
        spec: The codec.
        encode: Encodes a flat segment; returns the payload and its bytes, of which a probe's has none.
        settled: Takes the codec and the bytes when they are known, and again what they change by.
        ledger: Where the bytes are booked.
        cache: Remembers the last decoded segments.
    """

    __slots__ = ("_dtype", "_exact", "_ledger", "_version")

    def __init__(
        self,
        tensor: Tensor,
        layout: Layout,
        spec: CodecSpec,
        encode: Encode,
        settled: Callable[[CodecSpec, int], None],
        ledger: Ledger,
        cache: DecodeCache,
    ) -> None:
        held = Charge(ledger, waiting_bytes=tensor.nbytes)
        super().__init__(tensor, layout, (spec, spec), encode, settled, held, cache)
        self._exact: Kept | None = None
        self._version = tensor._version
        self._dtype = tensor.dtype
        self._ledger = ledger

    def settle(self, sign: object = None) -> None:
        """Encode the tensor and let go of it, unless it is to stay; no sign makes it smaller."""
        if self._exact is None:
            super().settle()

    def keep(self) -> None:
        """Keep the tensor as it is for good, if it is still there."""
        if self._kept is None or self._exact is not None:
            return
        self._exact, self.bits = self._kept, EXACT_BITS
        saved_bytes = _EXACT.stored_bytes(self.numel, self._dtype)
        self._held = Charge(self._ledger, saved_bytes=saved_bytes)
        self._settled(_EXACT, saved_bytes)

    def give_way(self, kept: Kept) -> None:
        """Let go of the code, or of waiting for it, where somebody keeps the tensor itself."""
        if self._exact is not None or not kept.has(self._version, self._dtype):
            return
        # What a probe holds instead is not booked by site.
        code_bytes = self._specs[0].stored_bytes(self.numel, self._dtype) if isinstance(self._inner, Payload) else 0
        self._settled(_EXACT, -code_bytes)
        self._exact, self.bits = kept, EXACT_BITS
        self._kept = self._held = self._inner = None

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        return super().decode() if self._exact is None else self._exact.segment(0, self.numel)


class OwnDerivatives:
    """The last of these tensors, not encoded yet; they live as long as somebody holds a handle of them.

    Attributes:
        waiting: Each with the operation that it is the result of, oldest first.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, ReferenceType[OwnDerivative]]] = []

    def add(self, tensor: OwnDerivative, node: Any) -> None:
        """Wait for what follows one more tensor, the result of this node of autograd's graph."""
        self.waiting.append((node, ref(tensor)))
        self._settle(len(self.waiting) - _CAPACITY)

    def settle(self) -> None:
        """Wait no longer."""
        self._settle(len(self.waiting))

    def keep_behind(self, root: Any) -> None:
        """Keep those as they are that a node of autograd's graph follows from, without a layer in between."""
        wanted = {node: tensor for node, tensor in self.waiting if tensor() is not None}
        nodes, seen = [root], {root}
        while nodes and len(seen) <= _MAX_NODES:
            node = nodes.pop(0)
            if node is None or node.name().startswith(_ENDS):
                continue
            found = wanted.get(node)
            tensor = None if found is None else found()
            if tensor is not None:
                tensor.keep()
            following = [each for each, _ in node.next_functions if each not in seen]
            seen.update(following)
            nodes += following

    def clear(self) -> None:
        """Forget them: who still waits is encoded when backward asks."""
        self.waiting = []

    def _settle(self, count: int) -> None:
        for _ in range(count):
            tensor = self.waiting.pop(0)[1]()
            if tensor is not None:
                tensor.settle()
