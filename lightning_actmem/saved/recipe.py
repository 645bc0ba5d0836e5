"""A recipe: an operation with its arguments, to be run again on what is stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor

from .geometry import Geometry

if TYPE_CHECKING:
    from .share import StoredStorage


class Source(NamedTuple):
    """An argument that has to be stored, or derivable, for the result to be derivable.

    Args:
        storage: Its storage.
        geometry: What of it, and when.
        small: The argument itself, if it is so small that it can be stored for the purpose, and still there.
    """

    storage: StoredStorage
    geometry: Geometry
    small: ReferenceType[Tensor] | None = None


class Slot(NamedTuple):
    """The place of a tensor among a recipe's arguments."""

    number: int


class Autocast(NamedTuple):
    """The autocast state that an operation ran under."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def now(device_type: str) -> Autocast | None:
        """The state for that type of device, or ``None`` where there is no autocast."""
        if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
            return None
        return _autocast(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))


# One object for each state and each slot: thousands of recipes refer to them, and the garbage collector walks them all.
_autocast = lru_cache(maxsize=64)(Autocast)
_slot = lru_cache(maxsize=64)(Slot)


class Recipe(NamedTuple):
    """An operation and its arguments, with slots where the tensors were.

    Args:
        function: What to run: the torch function itself, or one that gives the same result from what it saved.
        arguments: Positional arguments; a `Slot` stands for a tensor.
        keywords: Keyword arguments, likewise.
        autocast: The autocast state it ran under.
        inplace: Whether it changes its first argument.
        product: Whether it multiplies matrices, which is not cheap: run again for attention only.
        steps: What it adds to the length of a chain.
    """

    function: Callable[..., Any]
    arguments: Any
    keywords: Any
    autocast: Autocast
    inplace: bool = False
    product: bool = False
    steps: int = 1

    def run(self, tensors: list[Tensor]) -> Tensor:
        """Run the operation on these tensors, without gradient and unseen by torch-function modes."""
        if self.inplace:
            tensors[0] = tensors[0].clone(memory_format=torch.preserve_format)
        state = self.autocast
        # In backward there is mostly neither: to enter and leave the two contexts takes longer than many an operation.
        if state.enabled or torch.is_autocast_enabled(state.device_type) or torch.is_grad_enabled():
            enabled = state.enabled
            with torch.no_grad(), torch.autocast(state.device_type, state.dtype, enabled=enabled, cache_enabled=False):
                return self._run(tensors)
        return self._run(tensors)

    def _run(self, tensors: list[Tensor]) -> Tensor:
        with torch._C.DisableTorchFunction():
            result: Tensor = self.function(*_fill(self.arguments, tensors), **_fill(self.keywords, tensors))
        return result


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, in the order of their slots."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, (list, tuple, dict)):
                yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def with_slots(value: Any) -> Any:
    """Return arguments with a `Slot` for every tensor, numbered in the order of `tensors_of`."""
    return _slotted(value, itertools.count())


_PLAIN = (int, float, bool, str, type(None), torch.dtype)


def _slotted(value: Any, numbers: Iterator[int]) -> Any:
    if isinstance(value, Tensor):
        return _slot(next(numbers))
    if isinstance(value, (list, tuple)):
        items = [item if type(item) in _PLAIN else _slotted(item, numbers) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {name: _slotted(item, numbers) for name, item in value.items()}
    return value


def _fill(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.number]
    if isinstance(value, (list, tuple)):
        items = [tensors[item.number] if type(item) is Slot else _fill(item, tensors) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {name: _fill(item, tensors) for name, item in value.items()} if value else value
    return value
