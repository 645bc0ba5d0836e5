"""Which module is running: the layer path of a site."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

_METHOD_ATTRIBUTES = frozenset(["__self__", "__func__", "__name__", "__qualname__", "__doc__", "__code__"])


class Frame:
    """One running call of one module: its path, and how many tensors each (operation, role) has saved in it."""

    __slots__ = ("_ordinals", "is_loss", "layer")

    def __init__(self, layer: str, is_loss: bool = False) -> None:
        self.layer = layer
        self.is_loss = is_loss
        self._ordinals: dict[tuple[str, str], int] = {}

    def next_place(self, operation: str, role: str) -> tuple[str, str, str, int]:
        """Return layer, operation, role and 0 for the first tensor of this operation and role, then 1, and so on."""
        saved = operation, role
        ordinal = self._ordinals.get(saved, 0)
        self._ordinals[saved] = ordinal + 1
        return self.layer, operation, role, ordinal


class LayerScope:
    """Follows a model's module calls while it is installed.

    Each submodule gets an instance attribute ``forward`` that notes the call and then runs the module's own
    forward (0.2 us per call, where a forward hook costs 1.4 us). Compiled submodules run suspended instead:
    Python hooks inside a compiled graph would unpack everything at once when its backward starts.

    Attributes:
        stack: The running module calls, the innermost last.
    """

    def __init__(
        self,
        suspend: Callable[[], AbstractContextManager[None]],
        changed: Callable[[dict[str, str]], None] = lambda classes: None,
    ) -> None:
        self.stack: list[Frame] = [Frame("")]
        self._suspend = suspend
        self._changed = changed
        self._root: nn.Module | None = None
        self._modules: list[nn.Module] = []
        self._compiled: list[str] = []
        self._calls: list[tuple[dict[str, Any], _ScopedForward | _SuspendedForward]] = []

    @contextmanager
    def installed(self, root: nn.Module | None) -> Iterator[None]:
        """Follow the submodules of ``root`` inside this context; every ``forward`` is put back at its end."""
        self.stack = [Frame("", is_loss=_is_loss(root))]
        self._prepare(root)
        stack = self.stack
        for attributes, scoped in self._calls:
            scoped.forward = attributes.get("forward") or scoped.bound_forward()
            scoped.shadowed = "forward" in attributes
            scoped.stack = stack
            attributes["forward"] = scoped
        try:
            yield
        finally:
            for attributes, scoped in reversed(self._calls):
                if attributes.get("forward") is scoped:  # somebody may have put their own on top, and keeps it
                    if scoped.shadowed:
                        attributes["forward"] = scoped.forward
                    else:
                        del attributes["forward"]

    def release(self) -> None:
        """Let go of the modules that were followed last."""
        self._prepare(None)

    def compiled_layers(self, root: nn.Module) -> list[str]:
        """Return the paths of the outermost compiled submodules of ``root``."""
        self._prepare(root)
        return self._compiled

    def _prepare(self, root: nn.Module | None) -> None:
        """List the submodules again only when the tree has changed since the last step."""
        modules = [] if root is None else modules_of(root)
        if root is self._root and modules == self._modules:
            return
        self._root, self._modules = root, modules
        named = [] if root is None else list(root.named_modules())
        self._changed({layer: type(module).__name__ for layer, module in named})
        skip = "\0"
        self._calls = []
        self._compiled = []
        for layer, module in named:
            if isinstance(module, nn.DataParallel):
                skip = f"{layer}." if layer else ""  # its replicas are copies that would run the original's forward
            if not layer or layer.startswith(skip) or type(module).__name__ == "RecursiveScriptModule":
                continue
            if is_compiled(module):
                self._calls.append((vars(module), _SuspendedForward(module, self._suspend)))
                self._compiled.append(layer)
                skip = f"{layer}."
            else:
                self._calls.append((vars(module), _ScopedForward(module, layer)))


class _ForwardProxy:
    """Stands in for a module's ``forward``; looks, copies and pickles like it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward: Callable[..., Any] = self.bound_forward()
        self.shadowed = False
        self.stack: list[Frame] = []

    def bound_forward(self) -> Callable[..., Any]:
        return types.MethodType(type(self.module).forward, self.module)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # inspect.signature follows it
            return self.forward
        if name.startswith("__") and name not in _METHOD_ATTRIBUTES:  # copy and pickle must not find their protocol
            raise AttributeError(name)
        return getattr(self.__dict__["forward"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copy of the module made inside a step must run its own forward, not the original's."""
        copy = memo.get(id(self.module))
        return self.forward if copy is None else types.MethodType(type(copy).forward, copy)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")  # read on the copy, whose class gives its own forward


class _ScopedForward(_ForwardProxy):
    def __init__(self, module: nn.Module, layer: str) -> None:
        super().__init__(module)
        self.layer = layer
        self.is_loss = _is_loss(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        depth = len(stack)
        stack.append(Frame(self.layer, self.is_loss))
        try:
            return self.forward(*args, **kwargs)
        finally:
            del stack[depth:]


class _SuspendedForward(_ForwardProxy):
    def __init__(self, module: nn.Module, suspend: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(module)
        self._suspend = suspend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._suspend():
            return self.forward(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile()`` has been applied to this module itself."""
    return (
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None  # Lightning's mark on a compiled LightningModule
    )


def _is_loss(module: nn.Module | None) -> bool:
    return module is not None and type(module).__name__.endswith("Loss")


def modules_of(root: nn.Module) -> list[nn.Module]:
    """Return a module and everything inside, a shared module as often as it is shared: in half of the time of torch."""
    modules = [root]
    for module in modules:
        modules.extend(child for child in module._modules.values() if child is not None)
    return modules
