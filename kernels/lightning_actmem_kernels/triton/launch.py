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

_TILE_ELEMENTS = 4096
# The interpreter takes milliseconds per program and little per element: few, large programs.
_TILE_ELEMENTS_INTERPRETED = 1 << 20


def groups_per_program(groups: int, group_size: int) -> int:
    """Height of a tile in groups, a power of two."""
    elements = _TILE_ELEMENTS_INTERPRETED if INTERPRETED else _TILE_ELEMENTS
    return int(min(elements // group_size, triton.next_power_of_2(groups)))


def launch_tiles(
    kernel: Any, arguments: tuple[Any, ...], constants: tuple[Any, ...], numel: int, group_size: int
) -> None:
    """Run a kernel over tiles of whole groups, and once more for the last tile where the tensor ends within a group.

    Args:
        kernel: Takes `arguments`, the first tile, `constants`, the rows of a tile and whether it may be ragged.
        arguments: What it reads and writes; the first decides on the device.
        constants: What it is compiled for.
        numel: Elements of the tensor.
        group_size: Elements per group.
    """
    groups = -(-numel // group_size)
    if not groups:
        return
    # A tile holds whole blocks of signs: 128 elements each.
    rows = max(groups_per_program(groups, group_size), 128 // group_size)
    tiles, ragged = -(-groups // rows), int(numel % group_size > 0)
    with on_device(arguments[0]):
        if tiles > ragged:
            kernel[(tiles - ragged,)](*arguments, 0, *constants, rows, False, **EXACT)
        if ragged:
            kernel[(1,)](*arguments, tiles - 1, *constants, rows, True, **EXACT)


def elements_per_program(elements: int) -> int:
    """Width of a one-dimensional tile, a power of two."""
    widest = _TILE_ELEMENTS_INTERPRETED if INTERPRETED else _TILE_ELEMENTS
    return int(min(widest, triton.next_power_of_2(elements)))


def as_words(flat: Tensor) -> Tensor:
    """View bfloat16 as int16: the kernels convert by integer operations, since the interpreter truncates its casts."""
    return flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Make t's device current: Triton launches there, wherever its arguments are."""
    if t.device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[object] = torch.get_device_module(t.device).device(t.device)
    return context
