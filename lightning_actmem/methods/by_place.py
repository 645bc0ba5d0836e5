"""Which method replaces an operation, where there are several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..saved.operation import operation_of


class Method(Protocol):
    """What replaces operations.

    Attributes:
        replacements: Runs in place of torch's own functions, see `OperationTracker.replacements`.
    """

    replacements: dict[Callable[..., Any], Callable[..., Any]]

    def end_step(self) -> None:
        """Let go of every tensor."""
        ...


class MethodsByPlace:
    """Runs each operation by the method that is chosen where the model is now.

    Args:
        methods: The methods by name.
        choose: Returns the name of the method for an operation; one that is not among ``methods`` leaves it alone.
    """

    def __init__(self, methods: Mapping[str, Method], choose: Callable[[str], str]) -> None:
        self._methods = methods
        self._choose = choose
        functions = {function for method in methods.values() for function in method.replacements}
        self.replacements: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(functions, self._run)

    def end_step(self) -> None:
        """Let go of every tensor."""
        for method in self._methods.values():
            method.end_step()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        method = self._methods.get(self._choose(operation_of(function).name))
        replacement = None if method is None else method.replacements.get(function)
        if replacement is None:
            return function(*arguments, **keywords)
        return replacement(function, arguments, keywords)
