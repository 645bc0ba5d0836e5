"""Triton's interpreter at three times its speed: without what it repeats for every function and checks for nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

INTERPRETED = find_spec("triton") is not None and not torch.cuda.is_available()


class _Unchanged:
    """In place of a record of what was patched: nothing to take back."""

    def restore(self) -> None:
        pass


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """Patch Triton's language once per module instead of at every call, and drop asserts about wrapping integers.

    The noise wraps on purpose; on a GPU those asserts exist in debug builds alone.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch_lang, builder = interpreter._patch_lang, interpreter.interpreter_builder
    scopes: dict[int, Any] = {}

    def patch_once(function: Any) -> _Unchanged:
        module = id(function.__globals__)
        if module not in scopes:
            scopes[module] = patch_lang(function)
        return _Unchanged()

    options = builder.options
    interpreter._patch_lang = patch_once
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    yield
    interpreter._patch_lang, builder.options = patch_lang, options
    for scope in reversed(scopes.values()):
        if scope is not None:  # Triton 3.2 takes nothing back
            scope.restore()
