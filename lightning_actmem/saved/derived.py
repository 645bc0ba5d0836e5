"""Memory segments that are computed when they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ActMemError
from .handle import Handle
from .ledger import Charge
from .payload import DERIVED_BITS, DecodeCache
from .recipe import Recipe


class Derived:
    """Stands for a payload: a segment that is computed from other handles.

    Args:
        recipe: How.
        handles: From what, one for each of the recipe's inputs.
        size: Shape of the result.
        stride: Its strides.
        dtype: Its type.
        cache: Remembers the last computed segments.
    """

    __slots__ = (
        "__weakref__",
        "_dtype",
        "bits",
        "cache",
        "charge",
        "depth",
        "handles",
        "mask",
        "numel",
        "recipe",
        "size",
        "stride",
        "uses",
    )

    def __init__(
        self,
        recipe: Recipe,
        handles: tuple[Handle, ...],
        size: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        cache: DecodeCache,
    ) -> None:
        self.recipe = recipe
        self.handles = handles
        self.size = size
        self.stride = stride
        self._dtype = dtype
        self.uses = 0
        self.cache = cache
        self.mask: Handle | None = None  # the exact sign of a ReLU's output
        self.charge: Charge | None = None  # what plain autograd would keep alive instead
        self.numel = torch.Size(size).numel()
        self.depth = recipe.steps + sum(handle.depth for handle in handles)
        self.bits = min([DERIVED_BITS, *(handle.bits for handle in handles)])

    def _restore_inputs(self) -> list[Tensor]:
        """Restore the deepest first: nothing else is then held while its own chain runs."""
        if len(self.handles) == 1:
            return [self.handles[0].restore()]
        order = sorted(range(len(self.handles)), key=lambda number: -self.handles[number].depth)
        restored = {number: self.handles[number].restore() for number in order}
        return [restored[number] for number in range(len(self.handles))]

    def decode(self) -> Tensor:
        """Return the segment, 1-D in memory order; the same values every time."""
        tensors = self._restore_inputs()
        if not all(tensor.untyped_storage().nbytes() or not tensor.numel() for tensor in tensors):
            raise ActMemError(
                "a tensor is to be computed again from a weight whose memory is not there at the moment (FSDP has "
                "resharded it). Set derive=False, or shard norm layers together with the layers that use their output."
            )
        # The ReLU of a rounded input would be biased upwards; where the exact sign is known, no ReLU is needed.
        sign = None if self.mask is None else self.mask.restore()
        result = self.recipe.run(tensors) if sign is None else torch.where(sign, tensors[0], 0.0)
        del tensors
        if result.stride() != self.stride or result.dtype != self._dtype:
            like = torch.empty_strided(self.size, self.stride, dtype=self._dtype, device=result.device)
            result = like.copy_(result)
        return result.detach().as_strided((self.numel,), (1,), 0)
