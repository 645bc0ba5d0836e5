"""Weights in every disguise, and casts of weights that are made again instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ActMemError
from .geometry import Geometry, is_plain
from .payload import EXACT_BITS

_CAST = "ToCopyBackward0"
VIEWS_AND_CASTS = frozenset(
    f"{name}Backward{number}"
    for name in (
        "T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Squeeze Expand Split SplitWithSizes Chunk Select "
        "Slice AsStrided Alias ToCopy Clone Narrow Unbind ViewAs Detach"
    ).split()
    for number in (0, 1, 2)
)


def is_weight(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter, or leads back to one through views and casts alone."""
    return is_parameter(tensor) or _origin(tensor) is not None


def is_parameter(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter itself."""
    # The exact type first: a Parameter's own check runs in Python.
    return type(tensor) is not Tensor and isinstance(tensor, nn.Parameter)


def recast(tensor: Tensor) -> Recast | None:
    """Return a handle that casts again, for a cast of a whole weight or a view of one (autocast makes them).

    Args:
        tensor: A tensor that leads back to a parameter.

    Returns:
        The handle, or ``None``: no cast, or not of a plain parameter as a whole.
    """
    if is_parameter(tensor):
        return None
    cast = tensor if tensor._base is None else tensor._base
    found = _origin(cast)
    if found is None or found[1] != [_CAST] or cast._version:
        return None  # copied or moved about in between, or changed since
    parameter = found[0]
    if not is_plain(parameter) or cast.dtype == parameter.dtype or cast.device != parameter.device:
        return None
    # Casts keep the strides unless they are told not to, and only of what is dense do they keep the order in memory.
    same = (cast.shape, cast.stride()) == (parameter.shape, parameter.stride())
    whole = cast.untyped_storage().nbytes() == parameter.numel() * cast.element_size()
    return Recast(parameter, tensor) if same and whole else None


class Recast:
    """A cast of a weight, or a view of one, that is made again: the weight stays alive anyway.

    Args:
        parameter: The weight.
        tensor: The cast, or a view of it.
    """

    __slots__ = ("__weakref__", "_geometry", "_version", "parameter")

    depth = 0
    bits = EXACT_BITS

    def __init__(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        self.parameter = parameter
        self._version = parameter._version
        self._geometry = Geometry.of(tensor)

    def restore(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: If the weight has been modified since.
            ActMemError: If the weight's memory is not there.
        """
        parameter, geometry = self.parameter, self._geometry
        if parameter._version != self._version:
            raise RuntimeError(
                f"a weight of shape {list(parameter.shape)} has been modified by an inplace operation (an optimizer's "
                "step?) between the forward pass, which cast it, and the backward pass, which casts it again. Call "
                "backward before the step, or set derive=False to keep what autocast has made of it."
            )
        if parameter.numel() and not parameter.untyped_storage().nbytes():
            raise ActMemError(
                "a weight is to be cast again whose memory is not there at the moment (somebody has freed or resharded "
                "it). Set derive=False to keep what autocast has made of it."
            )
        with torch.no_grad():
            cast = parameter.detach().to(geometry.dtype)
        return cast.as_strided(geometry.size, geometry.stride, geometry.start)


def _origin(tensor: Tensor) -> tuple[nn.Parameter, list[str]] | None:
    """Return the parameter that a tensor leads back to, and the views and casts between."""
    names: list[str] = []
    node: Any = tensor.grad_fn
    while node is not None:
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":
            return (node.variable, names) if isinstance(node.variable, nn.Parameter) else None
        if name not in VIEWS_AND_CASTS:
            return None
        names.append(name)
        node = node.next_functions[0][0]
    return None
