"""How kernels are launched: by what Triton compiled before, since its own launcher takes the host longer."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

# Triton decides between compiling and interpreting when a kernel is decorated, so once, at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# What NVIDIA's GPUs do in one instruction and AMD's in several, the kernels do in another way there.
AMD = tl.constexpr(torch.version.hip is not None)

# The reference rounds after every operation; a fused multiply-add would round once and change the last bit.
EXACT = {"enable_fp_fusion": False}

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# The last version whose `CompiledKernel` is known to call its launcher as `Case` does.
_LAST_KNOWN = (3, 8)
# Where the functions are that a profiler wants called around each launch; Triton 3.3 has no knobs.
_HOOKS: Any = CompiledKernel if hasattr(CompiledKernel, "launch_enter_hook") else triton.knobs.runtime

_HERE = nullcontext()
_ALIGNMENT_BYTES = 16

Views = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class Case:
    """A kernel for one dtype, one device and one set of constants.

    Triton's own launcher binds, specialises and hashes every argument anew: about 9 us of the host's time. What it
    specialises for are the dtypes, the constants, and the alignment of each pointer to 16 bytes; integers it does not.

    Args:
        kernel: A Triton function of tensors, numbers, which are `do_not_specialize`, and constants.
        constants: What it is compiled for.
        views: How it is to see the first two tensors; for what is launched directly only addresses count.
        device: Index of the device.
    """

    def __init__(self, kernel: Any, constants: tuple[Any, ...], views: Views, device: int) -> None:
        self._kernel = kernel
        self._constants = constants
        self._views = views
        self._device = device
        self._compiled: Any = None
        self._launcher: Callable[..., None] | None = None
        self._refused = False

    def launch(self, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
        """Run the kernel, by what Triton compiled before if that is certain to fit.

        Args:
            programs: Size of the grid.
            tensors: The first of this case's dtype, on its device.
            numbers: What the kernel takes after the tensors.
        """
        device, bits = self._device, 0
        arguments: list[Any] = []
        for tensor in tensors:
            pointer = tensor.data_ptr()
            arguments.append(pointer)
            # A tensor elsewhere is for Triton's launcher to refuse.
            bits |= pointer if tensor.get_device() == device else 1
        aligned, compiled = not bits % _ALIGNMENT_BYTES, self._compiled
        if not aligned or compiled is None:
            self._launch_by_triton(programs, tensors, numbers, aligned)
            return
        active = driver.active
        if active.get_current_device() != device:
            with torch.cuda.device(device):
                self.launch(programs, tensors, numbers)
            return
        arguments += numbers
        arguments += self._constants
        try:
            if self._launcher is None or _hooked():
                compiled[(programs, 1, 1)](*arguments)
            else:  # as that does, less what only the hooks read
                handles = active.get_current_stream(device), compiled.function, compiled.packed_metadata
                self._launcher(programs, 1, 1, *handles, None, None, None, *arguments)
        except TypeError:
            # Another Triton, whose launcher takes other arguments: it says so before it launches anything.
            self._compiled, self._refused = None, True
            self._launch_by_triton(programs, tensors, numbers, aligned)

    def _launch_by_triton(
        self, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], aligned: bool
    ) -> None:
        first, second = (view(tensor) for view, tensor in zip(self._views, tensors, strict=False))
        with on_device(first):
            compiled = self._kernel[(programs,)](first, second, *tensors[2:], *numbers, *self._constants, **EXACT)
        if aligned and not self._refused and _reusable(first):
            self._keep(compiled)

    def _keep(self, compiled: Any) -> None:
        self._compiled = compiled
        self._launcher = compiled.run if _TRITON <= _LAST_KNOWN else None


@cache
def case_of(kernel: Any, constants: tuple[Any, ...], views: Views, dtype: torch.dtype, device: int) -> Case:
    """The one case of these; see `Case`."""
    return Case(kernel, constants, views, device)


def _hooked() -> bool:
    """Whether somebody wants to be called around each launch."""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    # None where nobody has asked, or in later versions an empty chain.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _reusable(flat: Tensor) -> bool:
    """Whether a compiled kernel fits every call of its case."""
    # Triton 3.2 takes the arguments without the constants. For AMD Triton also specialises for tensors below 2 GB.
    return flat.is_cuda and torch.version.hip is None and not INTERPRETED and _TRITON >= (3, 3)


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Make t's device current: Triton launches there, wherever its arguments are."""
    index = t.get_device()
    # `get_device_module` takes longer than the rest of this.
    if index < 0 or index == (torch.cuda if t.is_cuda else torch.get_device_module(t.device)).current_device():
        return _HERE
    context: AbstractContextManager[object] = torch.get_device_module(t.device).device(t.device)
    return context


def as_words(flat: Tensor) -> Tensor:
    """View bfloat16 as int16: the kernels convert by integer operations, since the interpreter truncates its casts."""
    return flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat


def as_pairs(flat: Tensor) -> Tensor:
    """View bfloat16 as int32, two elements to a word, where it is aligned so; else as `as_words`."""
    if flat.dtype != torch.bfloat16 or flat.data_ptr() % 4:
        return as_words(flat)
    return flat[: flat.numel() // 2 * 2].view(torch.int32)


def as_it_is(t: Tensor) -> Tensor:
    """View nothing."""
    return t


def as_bytes(flat: Tensor) -> Tensor:
    """View booleans as what they are in memory."""
    return flat.view(torch.uint8)


def code_words(codes: Tensor) -> Tensor:
    """View codes as int32, four columns to a word; a copy where they are not aligned so."""
    return (codes.clone() if codes.data_ptr() % 4 else codes).view(torch.int32)
