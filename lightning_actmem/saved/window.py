"""Indices of a max pool: where in its window each maximum is, in 4 bits instead of 64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Positions that 4 bits tell apart.
LARGEST_WINDOW = 16
_OPERATIONS = frozenset(["max_pool2d", "max_pool2d_with_indices"])
_DEVICES = frozenset(["cpu", "cuda", "xpu"])
Pair = tuple[int, int]


class Window(NamedTuple):
    """The geometry of a 2-D max pool: output (i, j) sees rows ``i stride - padding + k dilation``, columns likewise.

    Args:
        width: Columns of the input, by which the indices count.
        kernel: Rows and columns of the window.
        stride: From one window to the next.
        padding: Rows and columns before the input.
        dilation: Between rows, and between columns, of a window.
    """

    width: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def positions(self, indices: Tensor) -> Tensor:
        """Return which element of its window each index points to, row by row.

        Args:
            indices: Integer [..., height, width] of the output, each one ``row * width + column`` of the input.

        Returns:
            uint8, in the same layout.
        """
        first_row, first_column = self._corners(indices)
        down = indices.div(self.width, rounding_mode="floor").sub_(first_row)
        down = down.div_(self.dilation[0], rounding_mode="floor")
        right = indices.remainder(self.width).sub_(first_column).div_(self.dilation[1], rounding_mode="floor")
        return down.mul_(self.kernel[1]).add_(right).to(torch.uint8)

    def indices(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what `positions` was given."""
        first_row, first_column = self._corners(positions)
        place = positions.to(dtype)
        rows = place.div(self.kernel[1], rounding_mode="floor").mul_(self.dilation[0]).add_(first_row)
        columns = place.remainder_(self.kernel[1]).mul_(self.dilation[1]).add_(first_column)
        return rows.mul_(self.width).add_(columns)

    def _corners(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first row of every row of windows, and the first column of every column."""
        height, width = output.shape[-2:]
        rows = torch.arange(height, device=output.device) * self.stride[0] - self.padding[0]
        columns = torch.arange(width, device=output.device) * self.stride[1] - self.padding[1]
        return rows.unsqueeze(1), columns


def window_of(operation: str, arguments: tuple[Any, ...], keywords: dict[str, Any], device: str) -> Window | None:
    """Return the geometry of a max pool, from its arguments.

    Args:
        operation: Plain name of the operation.
        arguments: Its positional arguments.
        keywords: Its keyword arguments.
        device: Type of the device.

    Returns:
        The geometry, or ``None`` for another operation, a larger window, or arguments that are no plain integers.
    """
    if operation not in _OPERATIONS or device not in _DEVICES:
        return None
    try:
        return _window(*arguments, **keywords)
    except TypeError:  # an overload with other names
        return None


def _window(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Window | None:
    step = kernel_size if stride in (None, [], ()) else stride
    kernel, strides, paddings, dilations = (_pair(value) for value in (kernel_size, step, padding, dilation))
    if kernel is None or strides is None or paddings is None or dilations is None:
        return None
    if kernel[0] * kernel[1] > LARGEST_WINDOW:
        return None
    return Window(input.shape[-1], kernel, strides, paddings, dilations)


def _pair(value: Any) -> Pair | None:
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(pair) not in (1, 2) or any(type(item) is not int for item in pair):
        return None
    return (pair[0], pair[-1])
