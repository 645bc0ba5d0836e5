"""What the launchers share: tile heights, views that Triton can address, and the arithmetic contract."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton decides between compiling and interpreting when a kernel is decorated, so once, at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# What NVIDIA's GPUs do in one instruction and AMD's in several, the kernels do in another way there.
AMD = tl.constexpr(torch.version.hip is not None)

# The reference rounds after every operation; a fused multiply-add would round once and change the last bit.
EXACT = {"enable_fp_fusion": False}

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Compiled kernels by case; None where reuse has failed.
_compiled: dict[tuple[Any, ...], Any] = {}

_HERE = nullcontext()

# Of 4 warps; those of AMD are twice as wide.
_THREADS = 256 if AMD.value else 128
_VECTOR_BYTES = 16
_BYTES_PER_PROGRAM = 4096
# The interpreter takes milliseconds per program and little per element: few, large programs.
_TILE_ELEMENTS_INTERPRETED = 1 << 20


def groups_per_program(groups: int, group_size: int, itemsize: int, sub_blocks: int, threads: int = _THREADS) -> int:
    """Height of a tile in groups, a power of two.

    A thread owns a vector of 16 bytes in each sub-block of its group, so that every access is that wide.

    Args:
        groups: Groups of the tensor.
        group_size: Elements per group.
        itemsize: Bytes per element.
        sub_blocks: Into how many tensors the kernel divides a tile.
        threads: Threads of a program.
    """
    elements = threads * sub_blocks * _VECTOR_BYTES // itemsize
    if INTERPRETED:
        elements = _TILE_ELEMENTS_INTERPRETED
    highest = elements // group_size
    return highest if groups >= highest else 1 << (groups - 1).bit_length()


def launch_tiles(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    numel: int,
    group_size: int,
    *,
    sub_blocks: int = 16,
    reads_pairs: bool = False,
    words: bool = True,
) -> None:
    """Run a kernel over tiles of whole groups, and once more for the last tile where the tensor ends within a group.

    Args:
        kernel: Takes `arguments`, the first tile, `constants`, the rows of a tile and whether it may be ragged.
        arguments: What it reads and writes, the flat tensor first and then its codes.
        constants: What it is compiled for.
        numel: Elements of the flat tensor.
        group_size: Elements per group.
        sub_blocks: Into how many tensors the kernel divides a tile.
        reads_pairs: Whether the kernel only reads the flat tensor, by `load_float`.
        words: Whether it takes codes four columns at a time.
    """
    if not numel:
        return
    flat = arguments[0]
    rows, tiles, ragged = _tiles(numel, group_size, flat.element_size(), sub_blocks)
    code_view = code_words if words else as_it_is
    with on_device(flat):
        if tiles > ragged:
            views = (as_pairs if reads_pairs else as_words, code_view)
            launch(kernel, tiles - ragged, views, (*arguments, 0), (*constants, rows, False))
        if ragged:
            launch(kernel, 1, (as_words, code_view), (*arguments, tiles - 1), (*constants, rows, True))


@lru_cache(maxsize=1024)
def _tiles(numel: int, group_size: int, itemsize: int, sub_blocks: int) -> tuple[int, int, bool]:
    """Rows of a tile, number of tiles, and whether the tensor ends within a group."""
    groups = -(-numel // group_size)
    # A tile holds whole blocks of signs: 128 elements each.
    rows = max(groups_per_program(groups, group_size, itemsize, sub_blocks), 128 // group_size)
    return rows, -(-groups // rows), numel % group_size > 0


def launch(
    kernel: Any,
    programs: int,
    views: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
) -> None:
    """Run a kernel, by what Triton compiled for the same case before if that is certain to fit.

    Triton's own launcher binds, specialises and hashes every argument anew: about 9 us of the host's time. What it
    specialises for are the dtypes, the constants, and the alignment of each pointer to 16 bytes; integers it does not.

    Args:
        kernel: A Triton function whose integers are `do_not_specialize`.
        programs: Size of the grid.
        views: How the kernel is to see the first two tensors; for what is launched directly only addresses count.
        arguments: Tensors, the flat one first, then integers.
        constants: What the kernel is compiled for.
    """
    flat = arguments[0]
    device, bits = flat.get_device(), 0
    pointers = list(arguments)
    for place, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            break
        pointers[place] = pointer = argument.data_ptr()
        # A tensor elsewhere is for Triton's launcher to refuse.
        bits |= pointer if argument.get_device() == device else 1
    aligned = not bits % _VECTOR_BYTES
    case = (id(kernel), flat.dtype, device, constants)
    compiled = _compiled.get(case) if aligned else None
    if compiled is not None:
        try:
            compiled[(programs, 1, 1)](*pointers, *constants)
            return
        except TypeError:
            # Another Triton, whose launcher takes other arguments: it says so before it launches anything.
            _compiled[case] = None
    first, second = (view(argument) for view, argument in zip(views, arguments, strict=False))
    compiled = kernel[(programs,)](first, second, *arguments[2:], *constants, **EXACT)
    if aligned and _reusable(flat):
        _compiled.setdefault(case, compiled)


def _reusable(flat: Tensor) -> bool:
    """Whether a compiled kernel fits every call of its case."""
    # Triton 3.2 takes the arguments without the constants. For AMD Triton also specialises for tensors below 2 GB.
    return flat.is_cuda and torch.version.hip is None and not INTERPRETED and _TRITON >= (3, 3)


def elements_per_program(elements: int) -> int:
    """Width of a one-dimensional tile, a power of two."""
    widest = _TILE_ELEMENTS_INTERPRETED if INTERPRETED else _BYTES_PER_PROGRAM
    return min(widest, 1 << (elements - 1).bit_length())


def as_words(flat: Tensor) -> Tensor:
    """View bfloat16 as int16: the kernels convert by integer operations, since the interpreter truncates its casts."""
    return flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat


def as_pairs(flat: Tensor) -> Tensor:
    """View bfloat16 as int32, two elements to a word, where it is aligned so; else as `as_words`."""
    if flat.dtype != torch.bfloat16 or flat.data_ptr() % 4:
        return as_words(flat)
    return flat[: flat.numel() // 2 * 2].view(torch.int32)


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Make t's device current: Triton launches there, wherever its arguments are."""
    index = t.get_device()
    # `get_device_module` takes longer than the rest of this.
    if index < 0 or index == (torch.cuda if t.is_cuda else torch.get_device_module(t.device)).current_device():
        return _HERE
    context: AbstractContextManager[object] = torch.get_device_module(t.device).device(t.device)
    return context


def as_it_is(t: Tensor) -> Tensor:
    """View nothing."""
    return t


def as_bytes(flat: Tensor) -> Tensor:
    """View booleans as what they are in memory."""
    return flat.view(torch.uint8)


def code_words(codes: Tensor) -> Tensor:
    """View codes as int32, four columns to a word; a copy where they are not aligned so."""
    return (codes.clone() if codes.data_ptr() % 4 else codes).view(torch.int32)
