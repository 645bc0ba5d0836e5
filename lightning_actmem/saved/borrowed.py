"""Storages that somebody else keeps alive: weights, buffers and the step's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, UntypedStorage, nn

from .scope import modules_of

_MAX_DEPTH = 8


class Borrowed:
    """The storages of a model and a batch, by identity.

    Packing them would add memory, since they stay alive anyway, and would put noise where no saving is.

    Args:
        module: The model; its parameters and buffers are borrowed.
        inputs: The batch: tensors in any nesting of mappings, sequences, dataclasses and plain objects. ``None``
            says that the inputs are not known.
    """

    def __init__(self, module: nn.Module | None = None, inputs: Any = None) -> None:
        self.knows_inputs = inputs is not None
        self._owners: dict[int, str] = {}
        self._versions: dict[int, int] = {}
        # Of what may die within the step: else its identity would be that of the next tensor there.
        self._weak: list[Any] = []
        self._free_weak_ref: Any = UntypedStorage._free_weak_ref  # at exit the class may go first
        #: ``"weight"``, ``"buffer"``, ``"input"`` or ``None`` for the identity of a storage.
        self.owner = self._owners.get
        for tensor in tensors_in(inputs):
            self._own(tensor, "input")
        # parameters() and buffers() go by names: 4 us per module and step, where this takes 0.6.
        modules = [] if module is None else modules_of(module)
        for each in modules:
            for buffer in each._buffers.values():
                self._own(buffer, "buffer")
        for each in modules:
            for parameter in each._parameters.values():
                self._own(parameter, "weight")

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor is a weight or lies in one's storage."""
        try:
            return self._owners.get(tensor.untyped_storage()._cdata) == "weight"
        except (NotImplementedError, RuntimeError):
            return False

    def has_changed(self, weight: Tensor) -> bool:
        """Whether a weight has been changed in place since the step began; of what is not known, no."""
        version = weight._version
        return self._versions.get(weight.untyped_storage()._cdata, version) != version

    def _own(self, tensor: Tensor | None, owner: str) -> None:
        if tensor is None:
            return
        try:
            storage = tensor.untyped_storage()
        except (
            NotImplementedError,
            RuntimeError,
            ValueError,
        ):  # DTensor, sparse, nested, not materialised
            return
        if storage.nbytes():
            self._owners[storage._cdata] = owner
            if owner == "weight":
                self._versions[storage._cdata] = tensor._version
            else:
                self._weak.append(storage._weak_ref())

    def __del__(self) -> None:
        for weak in self._weak:
            self._free_weak_ref(weak)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested mappings, sequences, dataclasses and plain objects, each object once."""
    yield from _tensors_in(value, 0, set())


def _tensors_in(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None or isinstance(value, (str, bytes, int, float, nn.Module, type)) or depth == _MAX_DEPTH:
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    elif is_dataclass(value):
        parts = [getattr(value, part.name, None) for part in fields(value)]
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors_in(part, depth + 1, seen)
