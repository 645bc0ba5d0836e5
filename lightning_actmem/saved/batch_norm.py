"""Batch norm in training: run again from its statistics, and found again behind a ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operation as ops
from .derived import Derived
from .handle import Handle, Packed
from .probe import ProbePayload
from .recipe import Autocast, Recipe, Slot, Source
from .signed import Sign
from .undecided import Undecided, undecided_behind

if TYPE_CHECKING:
    from .tracker import Call

_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def given_to_batch_norm(call: Call) -> dict[str, Any]:
    """Return what a batch norm was called with, by name."""
    if call.function is not F.batch_norm:
        return {}  # torch.batch_norm has another order of arguments
    return {**dict(zip(_ARGUMENTS, call.arguments, strict=False)), **call.keywords}


def batch_norm_recipe(
    call: Call, inputs: tuple[Source, ...], autocast: Autocast
) -> tuple[Recipe, tuple[Source | Handle, ...]] | None:
    """Normalise by the statistics of the forward pass, which the operation has saved."""
    given = given_to_batch_norm(call)
    statistics = [handle for tensor, handle in call.saved or () if tensor.is_floating_point() and tensor.dim() == 1]
    affine = [given[name] for name in ("weight", "bias") if given.get(name) is not None]
    if len(statistics) < 2 or len(affine) == 1:
        return None
    sources = [
        value for (tensor, _), value in zip(call.inputs(), inputs, strict=True) if any(tensor is w for w in affine)
    ]
    slots = tuple(Slot(number) for number in range(3 + len(sources)))
    if len(sources) != len(affine):
        return None
    # One multiply-add on what is decoded: it does not count as a step, or outputs of residual blocks would be stored
    # again every third block.
    return Recipe(_normalised, slots, {}, autocast, steps=0), (inputs[0], *statistics[:2], *sources)


def signs_behind(derived: Derived) -> Iterator[tuple[Undecided | ProbePayload, Sign | None]]:
    """Yield the inputs of batch norms that wait behind a ReLU's output, or behind something else that is derived.

    Args:
        derived: With a mask, the ReLU's output.

    Yields:
        What waits, and the sign that helps to store it: ``None`` when it is not a ReLU that reads the norm's output
        first.
    """
    mask = derived.mask
    if mask is None:
        for norm, _ in _norms(derived, direct=True):
            if (undecided := undecided_behind(norm.handles[0])) is not None:
                yield undecided, None
        return
    source = _whole(derived.handles[0])
    for norm, direct in _norms(source, direct=True):
        if (undecided := undecided_behind(norm.handles[0])) is not None:
            yield undecided, Sign(mask, derived.size, norm.handles[1:], direct)


def _whole(handle: Handle) -> Derived | None:
    """Return what a handle shows unchanged: of a transposed view another element's sign would be taken."""
    payload = getattr(handle, "payload", None)
    is_whole = (
        isinstance(payload, Derived) and isinstance(handle, Packed) and handle.shows(payload.size, payload.stride)
    )
    return payload if is_whole else None


def _norms(payload: Any, direct: bool) -> Iterator[tuple[Derived, bool]]:
    """Yield the batch norms that something is the output or a sum of."""
    if not isinstance(payload, Derived):
        return
    function = payload.recipe.function
    if function is _normalised:
        yield payload, direct
    elif ops.operation_of(function).name == "add":
        for handle in payload.handles:
            yield from _norms(_whole(handle), direct=False)


def _normalised(
    x: Tensor, mean: Tensor, inverse_deviation: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    scale = inverse_deviation if weight is None else inverse_deviation * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(shape).to(x.dtype), x, scale.view(shape).to(x.dtype))
