"""When an operation may be replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..saved.geometry import is_plain
from ..saved.identify import is_weight
from ..saved.operation import operation_of


class Gate:
    """Tells which calls of element-wise operations may be replaced; all others run as they are.

    Args:
        is_open: Whether an operation of this name may be replaced where the model is now: the engine's hooks are the
            ones that autograd calls, and neither a loss nor the user's patterns ask for exact tensors.
        min_elements: Smaller tensors stay as they are.
    """

    def __init__(self, is_open: Callable[[str], bool], min_elements: int) -> None:
        self._is_open = is_open
        self._min_elements = min_elements

    def allows_call(self, function: Callable[..., Any], keywords: dict[str, Any]) -> bool:
        """Whether a call gives a new tensor with gradient."""
        operation = operation_of(function)
        if not torch.is_grad_enabled() or "out" in keywords or operation.changes_first_argument(keywords):
            return False
        return self._is_open(operation.name)

    def allows_operands(self, operands: tuple[Tensor, ...]) -> bool:
        """Whether tensors are large, alike and plain, and one of them needs gradient."""
        first = operands[0]
        if first.numel() < self._min_elements or not any(operand.requires_grad for operand in operands):
            return False
        kind = first.shape, first.dtype, first.device
        return first.is_floating_point() and all(
            (operand.shape, operand.dtype, operand.device) == kind and is_plain(operand) and not is_weight(operand)
            for operand in operands
        )
