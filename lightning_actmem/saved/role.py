"""What a saved tensor is to the operation that saves it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .tracker import Call, storage_id_of
from .weights import VIEWS_AND_CASTS, is_parameter

#: Clearly the operation's own result.
_RESULT = "result", None, False


def role_of(tensor: Tensor, storage_id: int, call: Call) -> tuple[str, Tensor | None, bool]:
    """Name the argument that the tensor is, is a view of, or is an autocast copy of.

    Args:
        tensor: The tensor that autograd saves.
        storage_id: Identity of its storage.
        call: The operation.

    Returns:
        The role, the argument, and whether an argument has another type than the tensor: it may be a copy of that.
    """
    dtype = tensor.dtype
    if len(call.arguments) == 1 and not call.keywords:  # most operations by number
        argument = call.arguments[0]
        if type(argument) is Tensor and argument.dtype is dtype:
            is_argument = argument is tensor or storage_id_of(argument) == storage_id
            return (call.operation.argument_names[0], argument, False) if is_argument else _RESULT
    for name, argument in zip(call.operation.argument_names, call.arguments, strict=False):
        if argument is tensor:  # as most arguments are saved: no storage has to be asked for
            return name, argument, False
    cast_from: list[tuple[str, Tensor]] = []
    may_be_cast = False
    for name, argument, argument_id in call.operands():
        if argument_id == storage_id:
            return name, argument, False
        if argument.dtype != dtype:
            may_be_cast = True
            if _may_be_cast(tensor, argument):
                cast_from.append((name, argument))
    if cast_from:
        return (*cast_from[0], True) if len(cast_from) == 1 else ("operand", None, True)
    return "result", None, may_be_cast


def view_role(tensor: Tensor, role: str, call: Call) -> str:
    """Tell queries, keys and values apart that are views of one projection; the first argument of this view counts.

    Args:
        tensor: The tensor that autograd saves.
        role: What `role_of` makes of it.
        call: The operation.
    """
    for name, argument in call.named_tensors():
        same_view = argument.storage_offset() == tensor.storage_offset() and argument.shape == tensor.shape
        if same_view and storage_id_of(argument) == storage_id_of(tensor):
            return name
    return role


def _may_be_cast(tensor: Tensor, argument: Tensor) -> bool:
    if argument.numel() != tensor.numel():
        return False
    if not (tensor.is_floating_point() and argument.is_floating_point()):
        return False
    if is_parameter(argument) and argument.requires_grad:
        return False  # its cast leads back to it, see is_weight
    node: Any = tensor.grad_fn
    return node is None or node.name() in VIEWS_AND_CASTS
