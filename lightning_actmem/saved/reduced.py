"""Operations whose backward reads of a saved tensor its shape alone, or one bit per element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .operation import POOLS

#: Arguments that are saved for their shape alone. On MPS some pools do read their input.
UNREAD = {
    **dict.fromkeys(POOLS, frozenset(["input"])),
    **dict.fromkeys(("gather", "pad", "nll_loss"), frozenset(["input"])),
}
UNREAD_DEVICES = frozenset(["cpu", "cuda", "xpu"])

#: What a tensor is replaced by where the bit is off and where it is on, and the bit.
Levels = tuple[tuple[float, float], Callable[[Tensor], Tensor]]

# Narrower than this share of its bounds, an interval may have no number of a 16-bit type inside.
_NARROW = 2.0**-4


def one_bit(operation: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Levels | None:
    """Return the one bit that an operation's backward reads of the tensor it saves.

    Args:
        operation: Plain name of the operation.
        arguments: Its positional arguments.
        keywords: Its keyword arguments.

    Returns:
        The two stand-in values and the bit, or ``None``: another operation, or bounds that are no plain numbers.
    """
    rule = _RULES.get(operation)
    try:
        return None if rule is None else rule(*arguments, **keywords)
    except TypeError:  # an overload with other names
        return None


def is_piecewise(operation: str) -> bool:
    """Whether an operation's derivative jumps with its input: without that bit its tensors have to stay exact."""
    return operation in _RULES


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Levels | None:
    middle = _middle(min_val, max_val)
    if middle is None:
        return None
    return (_outside(max_val), middle), lambda x: (x > min_val) & (x < max_val)


def _clamp(input: Any, min: Any = None, max: Any = None) -> Levels | None:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    middle = _middle(low, high)
    if middle is None:
        return None
    return (_outside(high), middle), lambda x: (x >= low) & (x <= high)


def _relu6(input: Any, inplace: bool = False) -> Levels | None:
    return _hardtanh(input, 0.0, 6.0)


def _hardsigmoid(input: Any, inplace: bool = False) -> Levels | None:
    return _hardtanh(input, -3.0, 3.0)


def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Levels | None:
    return (-1.0, 1.0), lambda x: x > 0


def _threshold(input: Any, threshold: Any, value: Any, inplace: bool = False) -> Levels | None:
    if not isinstance(threshold, (int, float)):
        return None
    return (-math.inf, math.inf), lambda x: (x <= threshold).logical_not()


_RULES: dict[str, Callable[..., Levels | None]] = {
    "hardtanh": _hardtanh,
    "relu6": _relu6,
    "hardsigmoid": _hardsigmoid,
    "leaky_relu": _leaky_relu,
    "threshold": _threshold,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda input, min: _clamp(input, min),
    "clamp_max": lambda input, max: _clamp(input, None, max),
}
ONE_BIT = frozenset(_RULES)


def _middle(low: Any, high: Any) -> float | None:
    """Return a number well inside the interval in every float type, or ``None``."""
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float))):
        return None
    if math.isinf(low) or math.isinf(high):
        if math.isinf(low) and math.isinf(high):
            return 0.0
        return high - max(1.0, abs(high)) if math.isinf(low) else low + max(1.0, abs(low))
    return (low + high) / 2 if high - low > _NARROW * max(abs(low), abs(high)) else None


def _outside(high: float) -> float:
    return -math.inf if math.isinf(high) else math.inf
