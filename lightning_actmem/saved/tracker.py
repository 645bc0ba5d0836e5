"""Which operation is running, and with what arguments."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, is_grad_enabled
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .declared import Declared
from .geometry import Geometry, is_plain
from .operation import Operation, operation_of
from .recipe import tensors_of


class Call:
    """A torch function that is running.

    Args:
        operation: What is known of it, whatever its arguments.
        function: The function.
        arguments: Its positional arguments.
        keywords: Its keyword arguments.
    """

    __slots__ = ("_inputs", "_operands", "arguments", "function", "keywords", "operation", "saved")

    def __init__(
        self,
        operation: Operation,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> None:
        self.operation = operation
        self.function = function
        self.arguments = arguments
        self.keywords = keywords
        self.saved: list[tuple[Tensor, Any]] | None = None
        self._inputs: list[tuple[Tensor, Geometry | None]] | None = None
        self._operands: list[tuple[str, Tensor, int | None]] | None = None

    @property
    def in_place(self) -> bool:
        """Whether the function changes its first argument."""
        return self.operation.changes_first_argument(self.keywords)

    def inputs(self) -> list[tuple[Tensor, Geometry | None]]:
        """Return every tensor within the arguments and its geometry (``None``: not plain) at the first call of this."""
        if self._inputs is None:
            tensors = tensors_of([self.arguments, self.keywords] if self.keywords else self.arguments)
            self._inputs = [(tensor, Geometry.of(tensor) if is_plain(tensor) else None) for tensor in tensors]
        return self._inputs

    def operands(self) -> list[tuple[str, Tensor, int | None]]:
        """Return name, value and identity of the storage of every tensor among the arguments."""
        if self._operands is None:
            self._operands = [(name, tensor, storage_id_of(tensor)) for name, tensor in self.named_tensors()]
        return self._operands

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments."""
        if len(self.arguments) == 1 and not self.keywords and isinstance(self.arguments[0], Tensor):
            return [self.arguments[0]]  # most operations by number
        return [tensor for _, tensor in self.named_tensors()]

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return the name and value of every tensor among the arguments."""
        names = self.operation.argument_names
        found: list[tuple[str, Tensor]] = []
        for position, argument in enumerate(self.arguments):
            name = names[position] if position < len(names) else f"arg{position}"
            if isinstance(argument, Tensor):
                found.append((name, argument))
            elif isinstance(argument, (list, tuple)):
                found.extend(_numbered_tensors(name, argument))
        for name, argument in self.keywords.items():
            if isinstance(argument, Tensor):
                found.append((name, argument))
            elif isinstance(argument, (list, tuple)):
                found.extend(_numbered_tensors(name, argument))
        return found


def _nothing() -> None:
    """Stand for the function when none is running."""


#: Stands for the running call when there is none.
NO_CALL = Call(Operation(), _nothing, (), {})


class Observer(Protocol):
    """Who wants to know the results of operations.

    Attributes:
        operations: Plain names of these operations.
    """

    operations: frozenset[str]

    def after(self, call: Call, result: Any) -> None:
        """Take the result of an operation."""
        ...


class OperationTracker(TorchFunctionMode):
    """Notes the torch function that is running (0.4 us per operation beside the 0.7 us of any torch-function mode).

    An `observer` is told of those operations that it asks for and that run with gradient; ``replacements`` run instead
    of theirs, as ``replacement(function, arguments, keywords)``, and put into ``declared`` what they save, by its
    storage's identity.

    `call` is the running operation, and `NO_CALL` outside every operation: arguments are not kept beyond their call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call = NO_CALL
        self.observer: Observer | None = None
        self.replacements: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.declared: dict[int, Declared] = {}
        # Functions that just run, and whether they are observed: what has to be asked once in a step.
        self._known: dict[Callable[..., Any], tuple[Operation, bool]] = {}

    def __enter__(self) -> OperationTracker:
        self._known.clear()  # who observes and what is replaced may have changed
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation with its name and arguments on record."""
        known = self._known.get(func)
        if known is None:
            return self._run_unknown(func, types, args, kwargs or {})
        operation, is_observed = known
        outer = self.call
        self.call = call = Call(operation, func, args, kwargs or {})
        try:
            if is_observed and is_grad_enabled():
                return self._run_observed(call, func)
            return func(*args, **kwargs) if kwargs else func(*args)
        finally:
            self.call = outer

    def _run_observed(self, call: Call, run: Callable[..., Any]) -> Any:
        call.saved = []
        if (call.operation.in_place or call.keywords) and call.in_place:
            call.inputs()  # as they are before they change
        result = run(*call.arguments, **call.keywords)
        if self.observer is not None:
            self.observer.after(call, result)
        return result

    def _run_unknown(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of which more has to be asked, and note the others."""
        operation = operation_of(func)
        if operation.saves_nothing:
            return func(*args, **kwargs)
        is_observed = self.observer is not None and operation.name in self.observer.operations
        replacement = self.replacements.get(func)
        if replacement is None and not operation.hides_others:
            self._known[func] = operation, is_observed
            return self.__torch_function__(func, types, args, kwargs)
        outer = self.call
        self.call = call = Call(operation, func, args, kwargs)
        try:
            if replacement is None:
                with self:
                    return _without_override_check(func)(*args, **kwargs)
            run = functools.partial(_replaced, replacement, func)
            return self._run_observed(call, run) if is_observed and is_grad_enabled() else run(*args, **kwargs)
        finally:
            self.call = outer

    def name(self) -> str:
        """Return the running operation's plain name (``add_`` and ``__add__`` are ``add``), or ``""``."""
        return self.call.operation.name


def storage_id_of(tensor: Tensor) -> int | None:
    """Return the identity of a tensor's storage, ``None`` if it has none of its own (DTensor, nested, sparse)."""
    try:
        identity: int = tensor.untyped_storage()._cdata
        return identity
    except (NotImplementedError, RuntimeError):
        return None


def _replaced(replacement: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return replacement(function, args, kwargs)


def _numbered_tensors(name: str, items: list[Any] | tuple[Any, ...]) -> list[tuple[str, Tensor]]:
    return [(f"{name}{number}", item) for number, item in enumerate(items) if isinstance(item, Tensor)]


@functools.cache
def _without_override_check(function: types.FunctionType) -> Callable[..., Any]:
    """Return a copy of a `torch.nn.functional` function that does not look for torch-function modes itself.

    With the mode on, the original would hand itself to the mode again, without end.
    """
    quiet = {name: _no_override for name in vars(functional) if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **quiet},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _no_override(*_: Any) -> bool:
    return False
