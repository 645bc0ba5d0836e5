"""What an adaptation measures, when there are more sites than passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_actmem_kernels import CodecSpec

from ..saved.site import Site
from .sensitivity import Sensitivities

Target = tuple[Site, CodecSpec]
# More draws of the same than this bring less than measuring again at the next adaptation.
_MAX_DRAWS = 4


def schedule(wanted: Mapping[Site, Sequence[CodecSpec]], known: Sensitivities, passes: int) -> list[Target]:
    """Return what to measure, in order: new sites first, then codecs not yet measured, then the stalest.

    Of sites known by one codec those come first whose rounding matters most.

    Args:
        wanted: The codecs to be measured at each site, the most important first.
        known: What has been measured so far.
        passes: Number of measurements.

    Returns:
        At most ``passes`` targets; each appears again only after all others have.
    """

    def urgency(target: tuple[int, int, Target]) -> tuple[int, int, float, int, int]:
        place, order, (site, spec) = target
        last = known.last(site, spec)
        if last >= 0:
            return 2, last, 0.0, order, place
        if site not in known.averages:
            return (0 if place == 0 else 1), 0, 0.0, place, order
        largest = max(average.value for average in known.averages[site].values())
        return 1, spec.bits == 1, -largest, order, place

    targets = [
        (place, order, (site, spec))
        for order, (site, specs) in enumerate(wanted.items())
        for place, spec in enumerate(specs)
    ]
    ordered = [target for _, _, target in sorted(targets, key=urgency)]
    return (ordered * _MAX_DRAWS)[:passes]
