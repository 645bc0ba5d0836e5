"""The reference compiled by torch.compile, on CPUs with a C++ compiler, once enough work has passed to pay for it.

Compiling a codec takes 2 to 10 s and then saves about 1 s per thousand million elements. So the first `AFTER_ELEMENTS`
of each combination of codec, bits and rounding run eagerly, and short runs never compile. The bits are the same either
way: the compiled code contracts no product and sum into one rounding.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .chunks import CHUNK_ELEMENTS_CPU

AFTER_ELEMENTS = 1 << 31
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.enable_floating_point_contract_flag": "off",
    "compile_threads": 1,
}

_Function = Callable[..., Any]


class _Compiled:
    """What has run and what was compiled in this process."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[Any, ...]] = Counter()
        self.functions: dict[tuple[Any, ...], _Function] = {}
        self.failure: str | None = None


_state = _Compiled()


def cpu_path() -> str:
    """How the codecs run on the CPU in this process: eagerly or compiled, and why.

    Example:
        >>> cpu_path().split(":")[0] in ("eager", "compiled")
        True
    """
    if _state.failure:
        return f"eager: torch.compile failed with {_state.failure}"
    if not _has_compiler():
        return "eager: no C++ compiler found (g++, clang++ or the one that CXX names)"
    if not _state.functions:
        return f"eager: torch.compile starts after {AFTER_ELEMENTS} elements of one codec"
    return f"compiled: {len(_state.functions)} functions"


def run(function: _Function, data: tuple[Tensor, ...], constants: tuple[Any, ...], elements: int) -> Any:
    """Call `function(*data, *constants)`, compiled if that pays.

    Args:
        function: Works on a chunk of groups.
        data: Tensors, which must be on one device.
        constants: What the function may be compiled for.
        elements: Elements of the chunk; only full chunks are compiled for, so that one shape serves all.
    """
    if data[0].device.type == "cpu" and elements == CHUNK_ELEMENTS_CPU and not _state.failure and _has_compiler():
        case = (function, constants, *((t.shape, t.dtype) for t in data))
        compiled = _state.functions.get(case)
        if compiled is None and _state.seen[case] >= AFTER_ELEMENTS:
            compiled = torch.compile(function, dynamic=False, fullgraph=True, options=_OPTIONS)
            compiled = _state.functions[case] = _guarded(function, compiled)
        if compiled is not None:
            return compiled(*data, *constants)
        _state.seen[case] += elements
    return function(*data, *constants)


def _guarded(function: _Function, compiled: _Function) -> _Function:
    """The compiled function, out of reach of the caller's modes and hooks; the plain one should it fail to compile."""

    def call(*args: Any) -> Any:
        try:
            # What inductor warns of while it compiles is no concern of whoever trains.
            with warnings.catch_warnings(), torch.no_grad(), torch._C.DisableTorchFunction():
                warnings.simplefilter("ignore")
                return compiled(*args)
        except Exception as error:
            # Broken compilers fail in many ways, and none of them may stop a training run.
            _state.failure = f"{type(error).__name__}"
            _state.functions.clear()
            return function(*args)

    return call


@lru_cache(maxsize=1)
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
