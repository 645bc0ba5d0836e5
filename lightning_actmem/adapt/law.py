"""What a method of choosing bits has to say: what may be chosen, what is measured, and what variance follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lightning_actmem_kernels import CodecSpec

from ..config import ActMemConfig
from ..saved.probe import SiteUse
from ..saved.site import Site
from .candidates import candidates, references
from .replay import Replay
from .schedule import Target, schedule
from .sensitivity import Sensitivities

Choices = Mapping[Site, Sequence[CodecSpec]]
Found = dict[Site, dict[CodecSpec, Tensor]]


class Law(Protocol):
    """One method."""

    def candidates(self, site: Site, use: SiteUse, config: ActMemConfig) -> list[CodecSpec]:
        """Return the codecs that may be chosen at a site, beside keeping it exact."""
        ...

    def without_replay(self, replay: Replay, choices: Choices) -> Found:
        """Return the variances that are known after the exact backward pass, scalars on the device."""
        ...

    def targets(self, choices: Choices, known: Sensitivities, passes: int) -> list[Target]:
        """Return what to measure by replay, of sites of which `without_replay` knows nothing."""
        ...

    def variance(self, known: Sensitivities, site: Site, spec: CodecSpec | None) -> float | None:
        """Return the variance that a codec adds at a site, or ``None`` if nothing measured tells."""
        ...


class Measured:
    """Our own: the closed form where it holds, replay for the rest, and each codec's measured rates."""

    def candidates(self, site: Site, use: SiteUse, config: ActMemConfig) -> list[CodecSpec]:
        """Return every codec and width that the settings allow."""
        return candidates(site, use, config)

    def without_replay(self, replay: Replay, choices: Choices) -> Found:
        """Return the closed forms."""
        return replay.closed_form.variances(lambda site: choices[site])

    def targets(self, choices: Choices, known: Sensitivities, passes: int) -> list[Target]:
        """Return one width of each codec and site, the most urgent first."""
        return schedule({site: references(specs) for site, specs in choices.items()}, known, passes)

    def variance(self, known: Sensitivities, site: Site, spec: CodecSpec | None) -> float | None:
        """Return what the nearest measured width of the same codec tells."""
        return known.variance(site, spec)
