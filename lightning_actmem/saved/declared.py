"""What a replacement says of a tensor that it saves in place of what its operation would save."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .ledger import Charge


class Declared(NamedTuple):
    """A tensor saved by a replacement.

    Args:
        role: What it is to the operation: ``"derivative"``, ``"mask"``.
        bounds: Range that its values lie in whatever the input is, if there is one.
        own: Whether the replacement has made it, so that nobody else reads or writes its memory.
        result: The operation's result. As long as somebody holds it, another operation may take the tensor's place, and
            it is not worth encoding. ``None``: nothing may.
        charges: For the memory that plain autograd would keep in its place.
        raw_bytes: Bytes of those that were not booked before.
    """

    role: str
    bounds: tuple[float, float] | None = None
    own: bool = True
    result: Tensor | None = None
    charges: tuple[Charge, ...] = ()
    raw_bytes: int = 0
