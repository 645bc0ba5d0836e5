"""Tensors that are encoded only when it is clear that backward will read them."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ReferenceType, ref

from torch import Tensor

from .handle import Handle
from .ledger import Charge

# Results that the user holds while others are computed from them: branches of an expression, local variables.
_CAPACITY = 4


class Deferred:
    """A tensor that is encoded when its time has come, and never if nobody holds this handle any more by then.

    Args:
        encode: Encodes it and returns the handle; holds the tensor itself until then.
        charges: Bytes that are alive as long as this handle.
        held: The bytes that wait.
    """

    __slots__ = ("__weakref__", "_charges", "_encode", "_handle", "_held")

    def __init__(self, encode: Callable[[], Handle], charges: tuple[Charge, ...], held: Charge | None = None) -> None:
        self._encode: Callable[[], Handle] | None = encode
        self._charges = charges
        self._held = held
        self._handle: Handle | None = None

    def settle(self) -> Handle:
        """Encode the tensor, once, and return what stands for it."""
        if self._handle is None:
            assert self._encode is not None, "either the handle is there or the tensor"
            self._handle = self._encode()
            self._encode = self._held = None
        return self._handle

    def restore(self) -> Tensor:
        """Return the tensor: the same values every time, so encoded first."""
        return self.settle().restore()


class Deferrals:
    """The tensors of a step that wait: each until nobody can continue from its operation's result.

    Example:
        Of ``tanh(2 * sigmoid(x))`` each operation saves the derivative of all up to itself. That of the sigmoid dies
        with the sigmoid's result, so that only the last one is encoded.

    Attributes:
        waiting: Handles, each with the result that it waits for.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[ReferenceType[Deferred], ReferenceType[Tensor]]] = []

    def add(self, handle: Deferred, result: Tensor) -> None:
        """Have a tensor wait as long as somebody holds this result."""
        self.waiting.append((ref(handle), ref(result)))

    def settle(self, *, everything: bool = False) -> None:
        """Encode what has waited long enough, or everything, and forget what nobody holds any more."""
        alive = [entry for entry in self.waiting if entry[0]() is not None]
        excess = len(alive) - _CAPACITY
        self.waiting = []
        try:
            for number, (handle, result) in enumerate(alive):
                waiting = handle()
                if waiting is None:
                    continue
                if everything or number < excess or result() is None:
                    waiting.settle()
                else:
                    self.waiting.append((handle, result))
        except BaseException:
            self.waiting = alive  # those that are encoded already stay as they are
            raise
