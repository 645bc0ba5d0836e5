"""What element-wise operations compute: their derivatives, the range of these, and what autograd saves for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

Bounds = tuple[float, float]


class Curve(NamedTuple):
    """A function of one tensor, ``y = f(x)``.

    Args:
        input: x.
        chain: Returns ``c f'(x)`` of c, x and y.
        bounds: A range that f' lies in whatever x is, if there is one.
        saves_result: Whether autograd's own backward keeps y; else it keeps x.
        multiple: Of x, that f' is, if it is one: then x itself may be kept, which something else may keep too.
    """

    input: Tensor
    chain: Callable[[Tensor, Tensor, Tensor], Tensor]
    bounds: Bounds | None = None
    saves_result: bool = False
    multiple: float | None = None


class Sum(NamedTuple):
    """A weighted sum of tensors, and perhaps a constant, of which autograd keeps nothing.

    Args:
        terms: The tensors with their weights.
    """

    terms: tuple[tuple[Tensor, float], ...]


class Product(NamedTuple):
    """A product of two tensors, of which autograd keeps both.

    Args:
        left: One of them.
        right: The other.
    """

    left: Tensor
    right: Tensor


Form = Curve | Sum | Product
Rule = Callable[..., Form | None]

# Extrema of the derivatives, rounded outward; both forms of GELU.
_GELU = (-0.12901, 1.12901)
_SILU = (-0.09985, 1.09985)
_MISH = (-0.11253, 1.0885)
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_ERF_SLOPE = 2 / math.sqrt(math.pi)


def _gelu(input: Tensor, approximate: str = "none") -> Form:
    return Curve(input, lambda c, x, y: aten.gelu_backward(c, x, approximate=approximate), _GELU)


def _silu(input: Tensor, inplace: bool = False) -> Form | None:
    return None if inplace else Curve(input, lambda c, x, y: aten.silu_backward(c, x), _SILU)


def _mish(input: Tensor, inplace: bool = False) -> Form | None:
    return None if inplace else Curve(input, lambda c, x, y: aten.mish_backward(c, x), _MISH)


def _hardswish(input: Tensor, inplace: bool = False) -> Form | None:
    return None if inplace else Curve(input, lambda c, x, y: aten.hardswish_backward(c, x), (-0.5, 1.5))


def _softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Form:
    return Curve(input, lambda c, x, y: aten.softplus_backward(c, x, beta, threshold), (0.0, 1.0))


def _elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Form | None:
    return None if inplace else _exponential_linear(input, alpha, 1.0, 1.0)


def _selu(input: Tensor, inplace: bool = False) -> Form | None:
    return None if inplace else _exponential_linear(input, _SELU_ALPHA, _SELU_SCALE, 1.0)


def _celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Form | None:
    if inplace or alpha <= 0:  # below 0 the derivative grows without bound
        return None
    return _exponential_linear(input, alpha, 1.0, 1.0 / alpha)


def _exponential_linear(input: Tensor, alpha: float, scale: float, input_scale: float) -> Form:
    slope = scale * alpha * input_scale  # just below zero; it falls to 0 from there
    bounds = min(0.0, slope), max(scale, slope)
    return Curve(input, lambda c, x, y: aten.elu_backward(c, alpha, scale, input_scale, False, x), bounds)


def _tanh(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: aten.tanh_backward(c, y), (0.0, 1.0), saves_result=True)


def _sigmoid(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: aten.sigmoid_backward(c, y), (0.0, 0.25), saves_result=True)


def _logsigmoid(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * torch.sigmoid(-x), (0.0, 1.0))


def _softsign(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c / (1 + x.abs()).square(), (0.0, 1.0))


def _tanhshrink(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * torch.tanh(x).square(), (0.0, 1.0))


def _exp(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * y, saves_result=True)


def _exp2(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * y * math.log(2), saves_result=True)


def _expm1(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * (y + 1), saves_result=True)


def _sin(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * torch.cos(x), (-1.0, 1.0))


def _cos(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * torch.sin(x).neg(), (-1.0, 1.0))


def _erf(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * x.square().neg().exp() * _ERF_SLOPE, (0.0, 1.1284))


def _square(input: Tensor) -> Form:
    return Curve(input, lambda c, x, y: c * x * 2, multiple=2.0)


def _pow(input: Tensor, exponent: Any) -> Form | None:
    if not _is_number(exponent) or exponent < 1:  # below 1 the derivative has no bound near zero
        return None
    if exponent == 2:
        return _square(input)
    return Curve(input, lambda c, x, y: c * x.pow(exponent - 1) * exponent)


def _neg(input: Tensor) -> Form:
    return Sum(((input, -1.0),))


def _add(input: Tensor, other: Any, *, alpha: float = 1) -> Form:
    return Sum(((input, 1.0),) if _is_number(other) else ((input, 1.0), (other, float(alpha))))


def _sub(input: Tensor, other: Any, *, alpha: float = 1) -> Form:
    return Sum(((input, 1.0),) if _is_number(other) else ((input, 1.0), (other, -float(alpha))))


def _rsub(input: Tensor, other: Any, *, alpha: float = 1) -> Form:
    return Sum(((input, -float(alpha)),) if _is_number(other) else ((input, -float(alpha)), (other, 1.0)))


def _mul(input: Tensor, other: Any) -> Form:
    if input is other:
        return _square(input)
    return Sum(((input, float(other)),)) if _is_number(other) else Product(input, other)


def _div(input: Tensor, other: Any, *, rounding_mode: str | None = None) -> Form | None:
    if not _is_number(other) or other == 0 or rounding_mode is not None:
        return None
    return Sum(((input, 1 / other),))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


_NAMES: dict[Rule, str] = {
    _gelu: "gelu",
    _silu: "silu",
    _mish: "mish",
    _hardswish: "hardswish",
    _softplus: "softplus",
    _elu: "elu",
    _selu: "selu",
    _celu: "celu",
    _tanh: "tanh",
    _sigmoid: "sigmoid expit",
    _logsigmoid: "logsigmoid log_sigmoid",
    _softsign: "softsign",
    _tanhshrink: "tanhshrink",
    _exp: "exp",
    _exp2: "exp2",
    _expm1: "expm1",
    _sin: "sin",
    _cos: "cos",
    _erf: "erf",
    _square: "square",
    _pow: "pow __pow__",
    _neg: "neg negative __neg__",
    _add: "add __add__ __radd__",
    _sub: "sub subtract __sub__",
    _rsub: "rsub __rsub__",
    _mul: "mul multiply __mul__ __rmul__",
    _div: "div divide true_divide __truediv__",
}


def _functions(names: str) -> Iterator[Callable[..., Any]]:
    for name in names.split():
        for owner in (torch, Tensor, F, torch.special):
            if hasattr(owner, name):
                yield getattr(owner, name)


#: By torch function. A rule takes the function's own arguments; ``None``: these arguments are not supported.
RULES: dict[Callable[..., Any], Rule] = {
    function: rule for rule, names in _NAMES.items() for function in _functions(names)
}


def operands(form: Form) -> tuple[Any, ...]:
    """Return the arguments of a form that have to be tensors."""
    if isinstance(form, Curve):
        return (form.input,)
    return tuple(tensor for tensor, _ in form.terms) if isinstance(form, Sum) else tuple(form)
