"""Inverted activations: GELU and SiLU keep their output, which the next layer keeps anyway, and one bit per element.

Neither function is monotonic: it falls from 0 to its minimum and rises from there. The bit ``m = [x < x_min]`` tells
which side x was on, and on each side f'(x) is a function of y = f(x) alone, here in an approximation with an absolute
error of at most 0.0187 for GELU in both its forms and 0.0029 for SiLU. Rounding y adds to that: f' is not linear in y,
so the gradient is biased.

Source: Novikov and Oseledets, "Inverted Activations", 2024, arXiv 2407.15545. The minimum of the tanh form is our own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..saved.declared import Declared
from ..saved.store import Store
from ..saved.tracker import OperationTracker
from .gate import Gate
from .once import require_first_order


class Inversion(NamedTuple):
    """A function that can be differentiated from its output and one bit.

    Args:
        minimum: Where it has its minimum, x_min.
        derivative: Returns f'(x) of y and m, both of one shape, y in float32 or float64.
    """

    minimum: float
    derivative: Callable[[Tensor, Tensor], Tensor]


_SILU_LOWEST = -0.2784645427610738


def _gelu_derivative(y: Tensor, below: Tensor, lowest: float) -> Tensor:
    u = (y - lowest).clamp_(min=0)
    t = (u / -lowest).clamp_(max=1)
    falling = 0.0012176597919768537 - 0.2964121012745849 * t**0.44236329315571304 * (1 - t) ** 0.8312705290392689
    polynomial = -1.383717971214795 + 1.5584201843500274 * u.sqrt() + 0.04404574801811055 * u
    rising = 1 + polynomial * torch.exp(-0.03214673676937606 * (2.1198850898439496 + u) ** 3)
    return torch.where(below, falling, rising)


def _silu_derivative(y: Tensor, below: Tensor) -> Tensor:
    # Below x_min y lies between the minimum and 0; beyond, where a rounded y may be, the formula has no bound.
    y = torch.where(below, y.clamp(max=0), y).clamp_(min=_SILU_LOWEST)
    u = y - _SILU_LOWEST
    root = u.sqrt()
    falling = -0.5076843705082636 * root + (0.3574942048593756 * u + 0.07963139766917564) * u + 0.21717700759576886
    polynomial = -1.3108564021309803 + 0.8485896470316523 * root - 0.16299051259510922 * u
    rising = 1 + polynomial * torch.exp(-0.0026961639850448835 * (5.770613302664509 + u) ** 3)
    return torch.where(below, falling, rising) * (1 - y) + y


GELU = Inversion(-0.7517915246935645, lambda y, below: _gelu_derivative(y, below, -0.16997120747990369))
#: The approximation of the other form, with this form's minimum in its place.
GELU_TANH = Inversion(-0.7524614354275009, lambda y, below: _gelu_derivative(y, below, -0.17004075057125403))
SILU = Inversion(-1.2784645427610738, _silu_derivative)


class InvertedActivations:
    """Runs GELU and SiLU in place of torch's own functions, see `OperationTracker.replacements`.

    Args:
        tracker: Is told what the operations save.
        store: Books what plain autograd would keep.
        gate: Tells which calls are to be left alone.
    """

    def __init__(self, tracker: OperationTracker, store: Store, gate: Gate) -> None:
        self._tracker = tracker
        self._store = store
        self._gate = gate
        self.replacements: dict[Callable[..., Any], Callable[..., Any]] = {F.gelu: self._gelu, F.silu: self._silu}

    def end_step(self) -> None:
        """Do nothing: no tensor is held."""

    def _gelu(self, function: Callable[..., Tensor], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        approximate = arguments[1] if len(arguments) > 1 else keywords.get("approximate", "none")
        return self._run(GELU_TANH if approximate == "tanh" else GELU, function, arguments, keywords)

    def _silu(self, function: Callable[..., Tensor], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        if len(arguments) > 1 and arguments[1]:  # in place
            return function(*arguments, **keywords)
        return self._run(SILU, function, arguments, keywords)

    def _run(
        self,
        inversion: Inversion,
        function: Callable[..., Tensor],
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Tensor:
        x = arguments[0] if arguments else keywords.get("input")
        if not (isinstance(x, Tensor) and self._gate.allows_call(function, keywords)):
            return function(*arguments, **keywords)
        if not self._gate.allows_operands((x,)):
            return function(*arguments, **keywords)
        with torch.no_grad():
            result = function(*arguments, **keywords)
            below = x < inversion.minimum
        charges, raw_bytes = self._store.raw_charges((x,))
        declared = self._tracker.declared
        declared[below.untyped_storage()._cdata] = Declared("mask", charges=charges, raw_bytes=raw_bytes)
        try:
            return _apply(self._tracker.name(), inversion, [result], below, x)
        finally:
            declared.clear()


class _Inverted(torch.autograd.Function):
    """A result that its derivative is computed from."""

    @staticmethod
    def forward(
        ctx: Any, operation: str, inversion: Inversion, result: list[Tensor], below: Tensor, x: Tensor
    ) -> Tensor:
        """Save result and bit.

        Args:
            ctx: Autograd's context.
            operation: Name of the operation.
            inversion: Tells the derivative.
            result: What the operation returned, in a list: as an argument autograd would take it for an input.
            below: Whether x is below the minimum.
            x: The operation's input.
        """
        ctx.operation = operation
        ctx.derivative = inversion.derivative
        ctx.save_for_backward(result[0], below)
        return result[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Multiply by the derivative."""
        (grad,) = grads
        require_first_order(ctx.operation, "inverted")
        y, below = ctx.saved_tensors
        exact = y.to(torch.float32) if y.dtype in (torch.bfloat16, torch.float16) else y
        return None, None, None, None, grad * ctx.derivative(exact, below).to(grad.dtype)


_apply: Callable[..., Tensor] = _Inverted.apply
