"""What the launchers share: tile heights, views that Triton can address, and the arithmetic contract."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# Triton decides between compiling and interpreting when a kernel is decorated, so once, at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The reference rounds after every operation; a fused multiply-add would round once and change the last bit.
EXACT = {"enable_fp_fusion": False}

# Of 4 warps; those of AMD are twice as wide.
_THREADS = 256 if torch.version.hip else 128
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
    return int(min(elements // group_size, triton.next_power_of_2(groups)))


def launch_tiles(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    numel: int,
    group_size: int,
    *,
    sub_blocks: int = 16,
    reads_pairs: bool = False,
) -> None:
    """Run a kernel over tiles of whole groups, and once more for the last tile where the tensor ends within a group.

    Args:
        kernel: Takes `arguments`, the first tile, `constants`, the rows of a tile and whether it may be ragged.
        arguments: What it reads and writes, the flat tensor first.
        constants: What it is compiled for.
        numel: Elements of the flat tensor.
        group_size: Elements per group.
        sub_blocks: Into how many tensors the kernel divides a tile.
        reads_pairs: Whether the kernel only reads the flat tensor, by `load_float`.
    """
    groups = -(-numel // group_size)
    if not groups:
        return
    flat, *others = arguments
    # A tile holds whole blocks of signs: 128 elements each.
    rows = max(groups_per_program(groups, group_size, flat.element_size(), sub_blocks), 128 // group_size)
    tiles, ragged = -(-groups // rows), int(numel % group_size > 0)
    with on_device(flat):
        if tiles > ragged:
            whole = as_pairs(flat) if reads_pairs else as_words(flat)
            kernel[(tiles - ragged,)](whole, *others, 0, *constants, rows, False, **EXACT)
        if ragged:
            kernel[(1,)](as_words(flat), *others, tiles - 1, *constants, rows, True, **EXACT)


def elements_per_program(elements: int) -> int:
    """Width of a one-dimensional tile, a power of two."""
    widest = _TILE_ELEMENTS_INTERPRETED if INTERPRETED else _BYTES_PER_PROGRAM
    return int(min(widest, triton.next_power_of_2(elements)))


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
    if t.device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[object] = torch.get_device_module(t.device).device(t.device)
    return context
