"""Pushing and popping the engine's hooks without disturbing anybody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

_autograd = torch._C._autograd


class HookStack:
    """Autograd's stack of saved-tensor hooks, as far as it is the engine's.

    Args:
        pack: The pack hook.
        unpack: The unpack hook.
        tracker: The torch-function mode that goes with them.
    """

    def __init__(self, pack: Callable[..., Any], unpack: Callable[..., Any], tracker: TorchFunctionMode) -> None:
        self._pair = pack, unpack
        self._tracker = tracker

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the hooks on the stack inside this context."""
        _autograd._push_saved_tensors_default_hooks(*self._pair)
        try:
            with self._tracker:
                yield
        finally:
            self._remove()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Have the hooks off the stack inside this context.

        Under other hooks (a checkpoint's) they do not run anyway and stay where they are.
        """
        if not self.is_innermost():
            with _mode_off(self._tracker):
                yield
            return
        _autograd._pop_saved_tensors_default_hooks()
        try:
            with _mode_off(self._tracker):
                yield
        finally:
            _autograd._push_saved_tensors_default_hooks(*self._pair)

    def is_innermost(self) -> bool:
        """Whether it is these hooks that autograd calls now."""
        top = _top()
        return top is not None and top[0] is self._pair[0]

    def _remove(self) -> None:
        """Take our pair off, also from under hooks that somebody entered inside and has not left yet."""
        above: list[tuple[Any, Any]] = []
        while (top := _top()) is not None:
            _autograd._pop_saved_tensors_default_hooks()
            if top[0] is self._pair[0]:
                break
            above.append(top)
        for pair in reversed(above):
            _autograd._push_saved_tensors_default_hooks(*pair)


def in_checkpoint() -> bool:
    """Whether a non-reentrant ``torch.utils.checkpoint`` has its hooks on top: other hooks inside would defeat it."""
    top = _top()
    return top is not None and getattr(top[0], "__module__", None) == torch.utils.checkpoint.__name__


def _top() -> tuple[Any, Any] | None:
    top: tuple[Any, Any] | None = _autograd._top_saved_tensors_default_hooks(True)
    return top


@contextmanager
def _mode_off(tracker: TorchFunctionMode) -> Iterator[None]:
    """Have the torch-function mode off the stack inside this context, if it is on top."""
    if torch.overrides._get_current_function_mode() is not tracker:
        yield
        return
    torch.overrides._pop_mode()
    try:
        yield
    finally:
        torch.overrides._push_mode(tracker)
