"""Nested forward-mode differentiation: a chain of element-wise operations saves its derivative and nothing else.

For ``y = f_K(... f_1(x))`` the forward carries ``d_k = f_k'(z) d_(k-1)`` along, and only ``d_K`` is kept: backward
returns ``g d_K``. What a rounded derivative adds to the gradient is unbiased, as the gradient is linear in it, and most
activations have derivatives in a small fixed range; rounding their input is neither. An open-coded GELU keeps one
tensor instead of four.

Each operation of a chain is a node of autograd's graph that leads straight to the chain's roots. So the nodes of
intermediate results die with these results, and what they have saved is never encoded (`Deferrals`).

Source: Guo et al., "Nested Forward Automatic Differentiation for Memory-Efficient Deep Neural Network Training", 2022,
arXiv 2209.10778.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..saved.declared import Declared
from ..saved.store import Store
from ..saved.tracker import OperationTracker
from .chain import Chain, Factor, merged, root_count
from .gate import Gate
from .once import require_first_order
from .rules import RULES, Curve, Form, Product, Sum, operands

# Results that a chain can go on from. Each holds derivatives in full: working memory, so there must be few.
_OPEN = 4


class _Open(NamedTuple):
    """A result that somebody still holds, so that the next operation may go on from it."""

    result: ReferenceType[Tensor]
    version: int
    chain: Chain


class DerivativeChains:
    """Runs element-wise operations in place of torch's own functions, see `OperationTracker.replacements`.

    A chain goes on while that costs no additional tensor. It ends, and its result is a new root, where an operation is
    not element-wise, broadcasts, involves a weight or more than two roots, works in place or changes the dtype.

    Args:
        tracker: Is told what the operations save.
        store: Books what plain autograd would keep.
        gate: Tells which calls are to be left alone.
    """

    def __init__(self, tracker: OperationTracker, store: Store, gate: Gate) -> None:
        self._tracker = tracker
        self._store = store
        self._gate = gate
        self._open: dict[int, _Open] = {}
        self.replacements: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(RULES, self._run)

    def end_step(self) -> None:
        """Let go of every tensor."""
        self._open.clear()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        form = self._form(function, arguments, keywords)
        if form is None:
            return function(*arguments, **keywords)
        tensors = operands(form)
        if isinstance(form, Curve):
            return self._curve(form, self._chain(form.input), lambda: function(*arguments, **keywords))
        chains = [self._chain(tensor) for tensor in tensors]
        if not _goes_on(form, chains):
            return function(*arguments, **keywords)
        if isinstance(form, Sum) and all(chain.linear for chain in chains):
            result = function(*arguments, **keywords)
            self._note(result, Chain(_factors(form, chains)))
            return result
        with _plainly(tensors[0]):
            result = function(*arguments, **keywords)
            factors = _factors(form, chains)
        return self._replaced(result, factors, chains, _saved_by_autograd(form))

    def _form(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Form | None:
        """Return what a call computes, or ``None`` when it is to be left alone."""
        if not self._gate.allows_call(function, keywords):
            return None
        try:
            form = RULES[function](*arguments, **keywords)
        except TypeError:  # not the arguments that the function is known to take
            return None
        if form is None or not all(isinstance(operand, Tensor) for operand in operands(form)):
            return None
        return form if self._gate.allows_operands(operands(form)) else None

    def _curve(self, form: Curve, chain: Chain, run: Callable[[], Any]) -> Tensor:
        with torch.no_grad():
            result: Tensor = run()
        x = form.input
        if result.dtype != x.dtype:  # autocast
            chain = _root(x)
        with _plainly(result):
            factors = tuple(factor.through(form, x.to(result.dtype), result) for factor in chain.factors)
        return self._replaced(result, factors, [chain], (result if form.saves_result else x,))

    def _chain(self, tensor: Tensor) -> Chain:
        """Return the chain that a tensor is the result of, or the one that begins with it."""
        found = self._open.get(id(tensor))
        if found is None or found.version != tensor._version or tensor.is_leaf:  # a leaf: it has been detached in place
            return _root(tensor)
        observed = tensor._backward_hooks or tensor.retains_grad  # gradient has to pass through it
        if observed or not all(factor.intact for factor in found.chain.factors):
            return _root(tensor)
        return found.chain

    def _replaced(
        self, result: Tensor, factors: tuple[Factor, ...], chains: list[Chain], saved: tuple[Tensor, ...]
    ) -> Tensor:
        """Make the result a node of autograd's graph that leads to the roots."""
        charges = [charge for chain in chains for charge in chain.charges]
        raw_bytes = 0
        if any(factor.own for factor in factors):  # a tensor that autograd would keep, too, is booked as such
            more, raw_bytes = self._store.raw_charges(saved)
            charges += more
        chain = Chain(factors, tuple(dict.fromkeys(charges)))
        with self._declaring(result, chain, raw_bytes):
            values = tuple((factor.weight, factor.value) for factor in factors)
            result = _apply(self._tracker.name(), [result], values, *(factor.root for factor in factors))
        self._note(result, chain)
        return result

    @contextmanager
    def _declaring(self, result: Tensor, chain: Chain, raw_bytes: int) -> Iterator[None]:
        """Tell the pack hook what the factors are; what plain autograd would keep is booked on the first own one."""
        declared = self._tracker.declared
        booked = False
        for factor in chain.factors:
            value, own = factor.value, factor.own
            if value is not None:
                books, booked = own and not booked, booked or own
                booking = (chain.charges, raw_bytes) if books else ((), 0)
                declared[value.untyped_storage()._cdata] = Declared("derivative", factor.bounds, own, result, *booking)
        try:
            yield
        finally:
            declared.clear()

    def _note(self, result: Tensor, chain: Chain) -> None:
        number = id(result)
        forget = ref(result, lambda _: self._open.pop(number, None))
        self._open[number] = _Open(forget, result._version, chain)
        while len(self._open) > _OPEN:
            del self._open[next(iter(self._open))]


class _Elementwise(torch.autograd.Function):
    """A result whose derivatives are known."""

    @staticmethod
    def forward(
        ctx: Any, operation: str, result: list[Tensor], values: tuple[tuple[float, Tensor | None], ...], *roots: Tensor
    ) -> Tensor:
        """Save the derivatives.

        Args:
            ctx: Autograd's context.
            operation: Name of the operation.
            result: What it returned, in a list: as an argument of its own autograd would take it for an input.
            values: Its derivatives with respect to the roots, as weight and tensor.
            *roots: The roots.
        """
        ctx.operation = operation
        ctx.weights = [(weight, value is not None) for weight, value in values]
        ctx.save_for_backward(*(value for _, value in values if value is not None))
        return result[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Multiply by the derivatives."""
        (grad,) = grads
        require_first_order(ctx.operation, "derivative")
        saved = iter(ctx.saved_tensors)
        results: list[Tensor | None] = []
        for needed, (weight, varies) in zip(ctx.needs_input_grad[3:], ctx.weights, strict=True):
            result = grad * next(saved) if varies else grad
            results.append((result if weight == 1.0 else result * weight) if needed else None)
        return None, None, None, *results


_apply: Callable[..., Tensor] = _Elementwise.apply


def _root(tensor: Tensor) -> Chain:
    return Chain((Factor.of(tensor),) if tensor.requires_grad else ())


def _goes_on(form: Form, chains: list[Chain]) -> bool:
    """Whether the result as a function of the roots takes no more tensors than as a function of the operands."""
    roots = root_count(*chains)
    if isinstance(form, Product):
        begun = any(not chain.linear for chain in chains)
        return roots <= 2 and (begun or (roots == 1 and all(chain.factors for chain in chains)))
    return roots <= max(len(chain.factors) for chain in chains)


def _factors(form: Sum | Product, chains: list[Chain]) -> tuple[Factor, ...]:
    """Return the factors of a sum or product of chains."""
    if isinstance(form, Sum):
        weights = [weight for _, weight in form.terms]
        parts = zip(chains, weights, strict=True)
        return merged(*(tuple(factor.scaled(weight) for factor in chain.factors) for chain, weight in parts))
    others = (form.right.detach(), form.left.detach())
    parts_of_product = zip(chains, others, strict=True)
    return merged(*(tuple(factor.times(other) for factor in chain.factors) for chain, other in parts_of_product))


def _saved_by_autograd(form: Form) -> tuple[Tensor, ...]:
    """Return the operands that autograd's own backward of a sum or product keeps."""
    if not isinstance(form, Product):
        return ()
    pairs = (form.left, form.right), (form.right, form.left)
    return tuple(tensor for tensor, other in pairs if other.requires_grad)


@contextmanager
def _plainly(tensor: Tensor) -> Iterator[None]:
    """Compute without gradient, in the dtype that the tensors have."""
    kind = tensor.device.type
    with torch.no_grad():
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield
