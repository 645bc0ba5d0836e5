"""What every site's rounding adds to the gradient's variance, averaged over adaptations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_actmem_kernels import CodecSpec

from ..saved.site import Site
from .rates import rescaled
from .state import as_list

# A new measurement counts as much as all earlier ones together.
_DECAY = 0.5


@dataclass
class Average:
    """An exponential average whose start does not count (Kingma & Ba, "Adam: a method for stochastic optimization").

    Args:
        total: Weighted sum of what was measured.
        weight: Sum of the weights.
        last: Number of the adaptation that measured last.
    """

    total: float = 0.0
    weight: float = 0.0
    last: int = -1

    def add(self, value: float, now: int, decay: float = _DECAY) -> None:
        """Take a measurement of adaptation ``now``; all earlier ones lose the share ``1 - decay`` of their weight."""
        self.total = decay * self.total + (1 - decay) * value
        self.weight = decay * self.weight + (1 - decay)
        self.last = now

    @property
    def value(self) -> float:
        """The average."""
        return self.total / self.weight


class Sensitivities:
    """The measured variances by site and codec, relative to the gradient's own: noises."""

    def __init__(self) -> None:
        self.averages: dict[Site, dict[CodecSpec, Average]] = {}

    def add(self, site: Site, spec: CodecSpec, values: Sequence[float], now: int) -> None:
        """Take the draws of one adaptation."""
        self.averages.setdefault(site, {}).setdefault(spec, Average()).add(sum(values) / len(values), now)

    def last(self, site: Site, spec: CodecSpec) -> int:
        """Return the number of the adaptation that measured this last, -1 for none."""
        average = self.averages.get(site, {}).get(spec)
        return -1 if average is None else average.last

    def variance(self, site: Site, spec: CodecSpec | None) -> float | None:
        """Return the variance that a codec adds at a site, from the nearest measured width of the same codec.

        Args:
            site: The site.
            spec: The codec; exact (``None``) adds nothing.

        Returns:
            The variance, or ``None`` if nothing measured tells.
        """
        if spec is None:
            return 0.0
        found = [
            (abs(known.bits - spec.bits), -average.last, variance)
            for known, average in self.averages.get(site, {}).items()
            if (variance := rescaled(average.value, known, spec)) is not None
        ]
        return min(found)[2] if found else None

    def state(self) -> list[Any]:
        """Return everything as lists, texts and numbers."""
        return [
            [list(site), as_list(spec), as_list(average)]
            for site, averages in self.averages.items()
            for spec, average in averages.items()
        ]

    def load(self, state: list[Any]) -> None:
        """Take what `state` returned."""
        self.averages = {}
        for site, spec, average in state:
            self.averages.setdefault(Site(*site), {})[CodecSpec(*spec)] = Average(*average)
