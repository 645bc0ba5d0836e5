"""Which codec at which site: the least variance for a number of bytes, or the fewest bytes for a variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_actmem_kernels import CodecSpec

# Sums of rounded products: what exceeds a limit by less than this share of it keeps it.
_SLACK = 1 + 1e-9


class Choice(NamedTuple):
    """One way to store a site's tensors.

    Args:
        spec: The codec, or ``None`` for exact.
        stored_bytes: Bytes that it takes.
        variance: What it adds to the gradient's variance, in any unit that all sites share.
    """

    spec: CodecSpec | None
    stored_bytes: int
    variance: float


class _Step(NamedTuple):
    """From one corner of a site's hull to the next; sorted by what a byte brings."""

    slope: float
    site: int
    corner: int


def least_variance(sites: Sequence[Sequence[Choice]], max_bytes: float) -> list[Choice]:
    """Choose for every site so that the variance is least and the bytes stay within a limit.

    On the lower convex hull of each site's choices the marginal gain per byte falls, so taking the steps in the order
    of their gain is optimal wherever the limit is reached exactly (Shoham & Gersho, "Efficient bit allocation for an
    arbitrary set of quantizers", IEEE Trans. ASSP 36, 1988). What is left of the limit is then filled greedily, with
    choices off the hull too.

    Args:
        sites: The choices of every site.
        max_bytes: The limit.

    Returns:
        One choice for each site; the cheapest ones where even they exceed the limit.
    """
    hulls = [_hull(choices) for choices in sites]
    chosen = [hull[0] for hull in hulls]
    left = max_bytes * _SLACK - sum(choice.stored_bytes for choice in chosen)
    blocked: set[int] = set()
    for step in _steps(hulls):
        choice = hulls[step.site][step.corner]
        extra = choice.stored_bytes - chosen[step.site].stored_bytes
        if step.site in blocked or extra > left:
            blocked.add(step.site)
            continue
        chosen[step.site] = choice
        left -= extra
    return _fill(sites, chosen, left)


def fewest_bytes(sites: Sequence[Sequence[Choice]], max_variance: float) -> list[Choice]:
    """Choose for every site so that the bytes are fewest and the variance stays within a limit.

    Args:
        sites: The choices of every site.
        max_variance: The limit.

    Returns:
        One choice for each site; those of least variance where even they exceed the limit.
    """
    hulls = [_hull(choices) for choices in sites]
    chosen = [hull[0] for hull in hulls]
    limit = max_variance * _SLACK
    total = sum(choice.variance for choice in chosen)
    for step in _steps(hulls):
        if total <= limit:
            break
        choice = hulls[step.site][step.corner]
        total += choice.variance - chosen[step.site].variance
        chosen[step.site] = choice
    return _shrink(sites, chosen, limit)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the corners of the lower convex hull, cheapest first; each has less variance than the one before."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.stored_bytes, choice.variance)):
        if hull and choice.variance >= hull[-1].variance:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        if hull and choice.stored_bytes == hull[-1].stored_bytes:
            continue
        hull.append(choice)
    return hull


def _slope(low: Choice, high: Choice) -> float:
    """Variance that a byte takes away."""
    return (low.variance - high.variance) / max(high.stored_bytes - low.stored_bytes, 1)


def _steps(hulls: list[list[Choice]]) -> list[_Step]:
    """Return every step of every hull, the most gain per byte first; equal gains in the order of the sites."""
    steps = [
        _Step(_slope(hull[corner - 1], hull[corner]), site, corner)
        for site, hull in enumerate(hulls)
        for corner in range(1, len(hull))
    ]
    return sorted(steps, key=lambda step: (-step.slope, step.site, step.corner))


def _fill(sites: Sequence[Sequence[Choice]], chosen: list[Choice], left: float) -> list[Choice]:
    """Spend the bytes that are left on whatever takes away most variance, as long as something fits."""
    while True:
        best: tuple[float, int, Choice] | None = None
        for site, choices in enumerate(sites):
            for choice in choices:
                gain = chosen[site].variance - choice.variance
                if choice.stored_bytes - chosen[site].stored_bytes <= left and gain > (best[0] if best else 0.0):
                    best = gain, site, choice
        if best is None:
            return chosen
        _, site, choice = best
        left -= choice.stored_bytes - chosen[site].stored_bytes
        chosen[site] = choice


def _shrink(sites: Sequence[Sequence[Choice]], chosen: list[Choice], limit: float) -> list[Choice]:
    """Save bytes wherever the variance that is left of the limit allows it, the most bytes first."""
    while True:
        left = limit - sum(choice.variance for choice in chosen)
        best: tuple[int, int, Choice] | None = None
        for site, choices in enumerate(sites):
            for choice in choices:
                saved = chosen[site].stored_bytes - choice.stored_bytes
                if choice.variance - chosen[site].variance <= left and saved > (best[0] if best else 0):
                    best = saved, site, choice
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
