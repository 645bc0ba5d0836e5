"""The input of a batch norm, coded with the help of the exact sign that the ReLU after it stores.

With x' = (x - mean) / deviation, and s = +-1 the ReLU's sign times that of the norm's weight, what is encoded is
v = s (x' + o). Where the ReLU follows the norm directly, o = bias / weight makes v the magnitude |x' + o|: of a normal
x', the group's mean put apart, it has 0.36 of the variance. After a residual sum o is 0, and v gains by how much the
norm's output has to do with the sign of the sum. x = mean + deviation (s v - o) is as unbiased as the code of v.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_actmem_kernels import Layout

from .handle import Handle
from .payload import AnyPayload

# Beyond it the sign hardly ever changes within a channel. Without a limit a channel of weight 0 would be at infinity.
_LARGEST_OFFSET = 3.0
# What is restored at a time, in elements: its temporaries would otherwise raise the peak of backward.
_PART = {"cpu": 1 << 18, "cuda": 1 << 24}


class Sign:
    """The sign of a ReLU's output, and what the batch norm before it did.

    Args:
        mask: Where the output is positive.
        size: Shape of the output.
        statistics: Handles of mean, 1 / deviation and, of an affine norm, weight and bias.
        direct: Whether nothing has been added between norm and ReLU.
    """

    __slots__ = ("_direct", "_mask", "_statistics", "size")

    def __init__(self, mask: Handle, size: tuple[int, ...], statistics: tuple[Handle, ...], direct: bool) -> None:
        self._mask = mask
        self._statistics = statistics
        self._direct = direct
        self.size = size

    def fold(self, x: Tensor) -> Tensor:
        """Return v for an input x of the batch norm, in the layout of x."""
        scale, shift = self._line(x.dim())
        v = torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device=x.device)
        for out, part, mask in _parts(v, x, self._mask.restore()):
            line = torch.addcmul(shift, part, scale)
            out.copy_(torch.where(mask, line, -line))
        return v

    def unfold_(self, v: Tensor) -> None:
        """Turn v into x, in place."""
        scale, shift = self._line(v.dim())
        inverse, back = 1 / scale, -shift / scale
        for out, part, mask in _parts(v, v, self._mask.restore()):
            out.copy_(torch.addcmul(back, torch.where(mask, part, -part), inverse))

    def _line(self, dimensions: int) -> tuple[Tensor, Tensor]:
        """Return scale and shift of v = +-(scale x + shift), float32 by channel."""
        mean, inverse_deviation, *affine = (handle.restore().float() for handle in self._statistics)
        scale, shift = inverse_deviation, -mean * inverse_deviation
        if affine:
            weight, bias = affine
            if self._direct:
                offset = (bias / weight).nan_to_num(0.0).clamp(-_LARGEST_OFFSET, _LARGEST_OFFSET)
                shift = shift + offset
            side = torch.where(weight < 0, -1.0, 1.0)
            scale, shift = scale * side, shift * side
        by_channel = (1, -1, *[1] * (dimensions - 2))
        return scale.view(by_channel), shift.view(by_channel)


class Signed:
    """A segment behind its sign.

    Args:
        payload: The encoded v.
        sign: The sign.
        layout: Layout of the batch norm's input.
    """

    __slots__ = ("_layout", "_payload", "_sign")

    def __init__(self, payload: AnyPayload, sign: Sign, layout: Layout) -> None:
        self._payload = payload
        self._sign = sign
        self._layout = layout

    def decode(self) -> Tensor:
        """Return the segment, 1-D; the same values every time."""
        flat = self._payload.decode()
        self._sign.unfold_(self._layout.unflatten(flat))
        return flat


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of tensors of one shape, along the first dimension."""
    first = tensors[0]
    rows = max(1, _PART.get(first.device.type, first.numel()) * len(first) // max(first.numel(), 1))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)
