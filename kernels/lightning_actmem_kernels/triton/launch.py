"""What the launchers share: tile heights, views that Triton can address, and the arithmetic contract."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

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
