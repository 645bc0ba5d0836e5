"""The closed form: for inputs of linear and convolution layers the variance follows from one exact backward pass.

A weight's gradient is linear in the input, so with an error e of mean 0, independent between elements,

    linear:       dW[o, c] = sum_t g[t, o] x[t, c]      Var = sum_t |g_t|^2 |e_t|^2
    convolution:  Var = sum_i e_i^2 B_i      B_i = |g|^2 summed over all outputs that the input element i touches

summed over the weight's elements, with g the gradient of the layer's output. No other parameter's gradient depends on
the input's stored copy. A tensor that something else reads too (or derives from) is left to replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_actmem_kernels import CodecSpec

from ..saved.geometry import Geometry
from ..saved.handle import Packed
from ..saved.probe import ProbePayload, Rounding
from ..saved.share import SharedStorages
from ..saved.site import Site

_LINEAR = frozenset([F.linear])
_CONVOLUTIONS = frozenset([F.conv1d, F.conv2d, F.conv3d])
#: The functions that `ClosedForm.run` takes the place of.
COVERED = _LINEAR | _CONVOLUTIONS
_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class _Reader(NamedTuple):
    """A layer that reads a stored segment: as a tensor of this shape, and what one unit of squared error costs there.

    Args:
        size: The shape.
        stride: Its strides.
        cost: Broadcastable to ``size``.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    cost: Tensor


@dataclass
class _Input:
    """A stored segment that linear layers read.

    Args:
        payload: The segment.
        expected: How many layers read it.
        readers: Those of them that backward has come by.
    """

    payload: ProbePayload
    expected: int = 0
    readers: list[_Reader] = field(default_factory=list)


class ClosedForm:
    """Follows the linear layers of one probe.

    Args:
        rounding: The probe.
        shared: What it stores.
    """

    def __init__(self, rounding: Rounding, shared: SharedStorages) -> None:
        self._rounding = rounding
        self._shared = shared
        self._inputs: dict[int, _Input] = {}
        self.collecting = False

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Run a linear layer; follow its input if that has been stored."""
        given = {**dict(zip(_CONVOLUTION_ARGUMENTS, arguments, strict=False)), **keywords}
        x, weight = given.get("input"), given.get("weight")
        uses = _uses(self._find(x))
        result = function(*arguments, **keywords)
        payload = self._find(x)
        # Under autocast it is a copy of the input that has been stored, and the input itself for somebody else.
        if payload is None or payload.uses != uses + 1 or result.grad_fn is None:
            return result
        if isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.requires_grad:
            cost = _linear_cost if function in _LINEAR else _convolution_cost(given, x, weight)
            if cost is not None:
                self._follow(payload, x, cost, result)
        return result

    def variances(self, specs_of: Callable[[Site], Sequence[CodecSpec]]) -> dict[Site, dict[CodecSpec, Tensor]]:
        """Return the variances after an exact backward pass that was collected.

        Args:
            specs_of: The codecs to consider at a site.

        Returns:
            For every site whose tensors are read by linear layers alone: the variance by codec, scalars on the device.
        """
        sites: dict[Site, list[_Input]] = {}
        for known in self._inputs.values():
            sites.setdefault(known.payload.site, []).append(known)
        return {
            site: {
                spec: torch.stack([_variance(known, spec, self._rounding) for known in group]).sum()
                for spec in specs_of(site)
            }
            for site, group in sites.items()
            if self._is_covered(site, group)
        }

    def _is_covered(self, site: Site, group: list[_Input]) -> bool:
        """Whether linear layers alone read the site's tensors. A ReLU reads the sign of its output, which is exact."""
        others = 1 if (site.operation, site.role) == ("relu", "result") else 0
        complete = all(len(known.readers) == known.expected == known.payload.uses - others for known in group)
        return complete and len(group) == len(self._rounding.uses[site].numels)

    def _find(self, x: Any) -> ProbePayload | None:
        """Return the stored segment that holds a layer's input and nothing else."""
        if type(x) is not Tensor or x.layout is not torch.strided:
            return None
        handle = self._shared[x.untyped_storage()].find(Geometry.of(x), 0)
        if not isinstance(handle, Packed) or not isinstance(handle.payload, ProbePayload):
            return None
        return handle.payload if handle.payload.numel == x.numel() else None

    def _follow(self, payload: ProbePayload, x: Tensor, cost: Callable[[Tensor], Tensor], result: Tensor) -> None:
        known = self._inputs.setdefault(id(payload), _Input(payload))
        known.expected += 1
        readers, size, stride, this = known.readers, tuple(x.shape), x.stride(), ref(self)

        def collect(gradients: Sequence[Tensor | None]) -> None:
            closed_form = this()
            if closed_form is not None and closed_form.collecting and gradients[0] is not None:
                readers.append(_Reader(size, stride, cost(gradients[0].detach().float())))

        node: Any = result.grad_fn
        node.register_prehook(collect)


def _uses(payload: ProbePayload | None) -> int:
    return 0 if payload is None else payload.uses


def _variance(known: _Input, spec: CodecSpec, rounding: Rounding) -> Tensor:
    raw = known.payload.raw()
    squares = (rounding.coded(raw, spec, known.payload.key) - raw).float().square_()
    return torch.stack(
        [(squares.as_strided(reader.size, reader.stride) * reader.cost).sum() for reader in known.readers]
    ).sum()


def _linear_cost(gradient: Tensor) -> Tensor:
    """``|g_t|^2`` of every row."""
    return gradient.square().sum(-1, keepdim=True)


def _convolution_cost(given: dict[str, Any], x: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return what gives ``B`` from the output's gradient: ``|g|^2`` through the transposed convolution with ones."""
    dimensions = weight.dim() - 2
    padding = given.get("padding", 0)
    if isinstance(padding, str) or x.dim() != weight.dim():
        return None
    stride, padding, dilation = (
        [value] * dimensions if isinstance(value, int) else [*value] * (dimensions // len(value))
        for value in (given.get("stride", 1), padding, given.get("dilation", 1))
    )
    groups = given.get("groups", 1)
    size = (x.shape[0], groups, *x.shape[2:])
    kernel = tuple(weight.shape[2:])
    channels = x.shape[1] // groups

    def cost(gradient: Tensor) -> Tensor:
        squares = gradient.square().unflatten(1, (groups, -1)).sum(2)
        ones = squares.new_ones(()).expand(groups, 1, *kernel)
        like = squares.new_empty(()).expand(size)
        outputs = [0] * dimensions
        touched: Tensor = torch.ops.aten.convolution_backward(
            squares, like, ones, None, stride, padding, dilation, False, outputs, groups, [True, False, False]
        )[0]
        return touched if groups == 1 else touched.repeat_interleave(channels, 1)

    return cost
