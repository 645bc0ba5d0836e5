"""Kernels over tiles of groups: how high a tile is, and what is launched for a tensor of a given size."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .launch import AMD, INTERPRETED, Case, as_it_is, as_pairs, as_words, case_of, code_words

# Of 4 warps; those of AMD are twice as wide.
_THREADS = 256 if AMD.value else 128
_VECTOR_BYTES = 16
_BYTES_PER_PROGRAM = 4096
# The interpreter takes milliseconds per program and little per element: few, large programs.
_TILE_ELEMENTS_INTERPRETED = 1 << 20


class TiledKernel:
    """A kernel that runs over tiles of whole groups, and once more where the tensor ends within a group.

    Args:
        kernel: Takes tensors, the elements of the flat one, numbers, the first tile, constants, the rows of a tile and
            whether it may be ragged.
        constants: Of the parameters of a call, group size first: what the kernel is compiled for.
        sub_blocks: Into how many tensors the kernel divides a tile.
        reads_pairs: Whether the kernel only reads the flat tensor, by `load_float`.
        words: Whether it takes codes four columns at a time.
    """

    def __init__(
        self,
        kernel: Any,
        constants: Callable[..., tuple[Any, ...]],
        *,
        sub_blocks: int = 16,
        reads_pairs: bool = False,
        words: bool = True,
    ) -> None:
        self.kernel = kernel
        self.constants = constants
        self.sub_blocks = sub_blocks
        self.reads_pairs = reads_pairs
        self.code_view = code_words if words else as_it_is

    def __call__(self, tensors: tuple[Tensor, ...], numel: int, numbers: tuple[float, ...], *parameters: Any) -> None:
        """Run it.

        Args:
            tensors: What the kernel reads and writes, the flat tensor first and then its codes.
            numel: Elements of the flat tensor.
            numbers: What else the kernel takes before the first tile.
            *parameters: Those of `constants`.
        """
        flat = tensors[0]
        for case, programs, first_tile in _launches(self, flat.dtype, flat.get_device(), numel, *parameters):
            case.launch(programs, tensors, (numel, *numbers, first_tile))


@lru_cache(maxsize=4096)
def _launches(
    tiled: TiledKernel, dtype: torch.dtype, device: int, numel: int, group_size: int, *parameters: Any
) -> tuple[tuple[Case, int, int], ...]:
    """Case, programs and first tile of each launch for a tensor: none, the whole tiles, the ragged one, or both."""
    constants, view = tiled.constants(group_size, *parameters), as_pairs if tiled.reads_pairs else as_words
    rows, tiles, ragged = _tiles(numel, group_size, dtype.itemsize, tiled.sub_blocks)
    launches = []
    if tiles > ragged:
        views = (view, tiled.code_view)
        launches.append((case_of(tiled.kernel, (*constants, rows, False), views, dtype, device), tiles - ragged, 0))
    if ragged:
        views = (as_words, tiled.code_view)
        launches.append((case_of(tiled.kernel, (*constants, rows, True), views, dtype, device), 1, tiles - 1))
    return tuple(launches)


def _tiles(numel: int, group_size: int, itemsize: int, sub_blocks: int) -> tuple[int, int, bool]:
    """Rows of a tile, number of tiles, and whether the tensor ends within a group."""
    groups = -(-numel // group_size)
    if not groups:
        return 0, 0, False
    # A tile holds whole blocks of signs: 128 elements each.
    rows = max(groups_per_program(groups, group_size, itemsize, sub_blocks), 128 // group_size)
    return rows, -(-groups // rows), numel % group_size > 0


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


def elements_per_program(elements: int) -> int:
    """Width of a one-dimensional tile, a power of two."""
    widest = _TILE_ELEMENTS_INTERPRETED if INTERPRETED else _BYTES_PER_PROGRAM
    return min(widest, 1 << (elements - 1).bit_length())
