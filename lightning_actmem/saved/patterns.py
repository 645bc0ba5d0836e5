"""Patterns of layers, of their classes and of operations, as users write them in settings."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

T = TypeVar("T")


class Patterns(Generic[T]):
    """Values by pattern; the last pattern that matches wins.

    A pattern is the path of a layer (``"encoder.0"``; what is inside it matches too), the class of a layer after
    ``type:`` (``"type:LayerNorm"``, likewise) or the name of an operation after ``op:`` (``"op:gelu"``); ``*``, ``?``
    and ``[...]`` stand for any characters, as in file names.

    Args:
        values: The values by pattern.
    """

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values = dict(values)
        self._known: dict[tuple[str, str], T | None] = {}
        self._classes: Mapping[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def name_classes(self, classes: Mapping[str, str]) -> None:
        """Take the names of the layers' classes, by path."""
        self._classes = classes
        self._known.clear()

    def find(self, layer: str, operation: str) -> T | None:
        """Return the value for an operation in a layer, or ``None``."""
        if not self._values:
            return None
        place = layer, operation
        if place not in self._known:
            names = [f"op:{operation}", *self._names(layer)]
            matches = [
                value for pattern, value in self._values.items() if any(fnmatchcase(name, pattern) for name in names)
            ]
            self._known[place] = matches[-1] if matches else None
        return self._known[place]

    def _names(self, layer: str) -> list[str]:
        """Return path and class of a layer and of everything it is inside of."""
        paths = [layer]
        while "." in paths[-1]:
            paths.append(paths[-1].rpartition(".")[0])
        return paths + [f"type:{self._classes[path]}" for path in [*paths, ""] if path in self._classes]
