"""What the adaptations of a run have found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_actmem_kernels import CodecSpec

from ..saved.probe import SiteUse
from ..saved.site import Site

OUTSIDE = "outside_submodules"


@dataclass(frozen=True)
class Record:
    """One adaptation, or the check of the plan that it has set.

    Args:
        step: The trainer's ``global_step``.
        epoch: The epoch.
        noise: Variance that rounding added to the gradient under the plan until now, relative to the minibatch
            gradient's own, measured with all sites rounded at once.
        predicted_noise: The same by the sum over the sites.
        planned_noise: The sum over the sites under the plan from now on.
        bits: Stored bits per element of every layer from now on.
        is_check: Whether the last plan alone was checked, with few passes.
        changes: For every site that is stored in another way from now on, what changes and why; no checkpoint has it.
    """

    step: int
    epoch: int
    noise: float
    predicted_noise: float
    planned_noise: float
    bits: dict[str, float]
    is_check: bool = False
    changes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names that loggers see.

        Returns:
            ``actmem/noise``, ``actmem/predicted_noise`` and ``actmem/bits/<layer>``.
        """
        figures = {"actmem/noise": self.noise, "actmem/predicted_noise": self.predicted_noise}
        return figures | {f"actmem/bits/{layer}": bits for layer, bits in self.bits.items()}

    def state(self) -> dict[str, Any]:
        """Return the fields as a checkpoint may hold them."""
        state = asdict(self)
        del state["changes"]
        return state

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Record:
        """Return the record that `state` was taken of."""
        return cls(**state)


def layer_bits(uses: Mapping[Site, SiteUse], plan: Mapping[Site, CodecSpec | None]) -> dict[str, float]:
    """Return the stored bits per element of every layer, scales and all, as far as codecs are chosen in it.

    Args:
        uses: What each site stores.
        plan: The codec of the sites that do not have their default.

    Returns:
        Layers in the order of the forward pass.
    """
    sums: dict[str, tuple[int, int]] = {}
    for site, use in uses.items():
        layer = site.layer or OUTSIDE
        stored_bytes, elements = sums.get(layer, (0, 0))
        stored_bytes += use.stored_bytes(plan.get(site, use.default))
        sums[layer] = stored_bytes, elements + sum(use.numels)
    return {layer: 8 * stored_bytes / elements for layer, (stored_bytes, elements) in sums.items() if elements}
