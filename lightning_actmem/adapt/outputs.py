"""The gradients behind the operations of a probe, by the segments that they have stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import ReferenceType

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..saved.probe import ProbePayload, Rounding


class Outputs(TorchFunctionMode):
    """Keeps, from the first backward pass on, the gradient of the output of every operation that has stored something.

    Args:
        rounding: The probe.
    """

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self._rounding = rounding
        self._gradients: list[tuple[ReferenceType[ProbePayload], Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and follow its output if it has stored something."""
        first = len(self._rounding.payloads)
        result = func(*args, **(kwargs or {}))
        stored = self._rounding.payloads[first:]
        node = result.grad_fn if isinstance(result, Tensor) else None
        if stored and node is not None:
            node.register_prehook(_collector(self._gradients, stored))
        return result

    def gradients(self) -> Iterator[tuple[ProbePayload, Tensor]]:
        """Return every stored segment that is alive with the gradient of its operation's output; once."""
        gradients, self._gradients[:] = list(self._gradients), []
        for reference, gradient in gradients:
            payload = reference()
            if payload is not None:
                yield payload, gradient


def _collector(
    gradients: list[tuple[ReferenceType[ProbePayload], Tensor]], stored: Sequence[ReferenceType[ProbePayload]]
) -> Callable[[Sequence[Tensor | None]], None]:
    due = list(stored)

    def collect(given: Sequence[Tensor | None]) -> None:
        if given[0] is not None:
            gradients.extend((reference, given[0].detach()) for reference in due)
            due.clear()

    return collect
