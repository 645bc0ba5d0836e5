"""What may be chosen at a site, and what has to be measured for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_actmem_kernels import CodecSpec
from lightning_actmem_kernels.spec import WIDTHS

from ..config import ActMemConfig
from ..saved.probe import SiteUse
from ..saved.site import Site

# What each setting of the codec allows at a site without needs of its own, with its widths.
_AUTO: Mapping[str, tuple[int, ...]] = {"uniform": (3, 4, 5, 6, 8), "rotated": (1, 2, 3, 4)}
_ALLOWED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "auto": _AUTO,
    "measured": _AUTO,
    "rotated": {"uniform": (5, 6, 8), "rotated": (1, 2, 3, 4)},
    "uniform": {"uniform": (1, 2, 3, 4, 5, 6, 8)},
}
# Scale and mean of a group of 256 are an eighth of a bit for each element, of one of 1024 a 32nd; where the groups of
# a tensor are alike, as a transformer's are, the larger ones err no more.
_WIDE_GROUP = 1024
# Where a codec's variance is measured first: at the fewest bits that the law holds from.
_FIRST_BITS = {"uniform": 4, "bfp": 3}


def candidates(site: Site, use: SiteUse, config: ActMemConfig) -> list[CodecSpec]:
    """Return the codecs that may be chosen at a site, beside keeping it exact.

    Args:
        site: The site.
        use: What the site stores.
        config: The settings: the codec, and the floors of attention and loss.
    """
    default, floor = use.default, least_bits(site, use, config)
    if default.codec not in ("uniform", "rotated"):  # exact zeros, a fixed range, or a codec asked for by name
        return [replace(default, bits=bits) for bits in WIDTHS[default.codec] if bits >= floor]
    centre = default.codec != "rotated" or default.centre
    return [
        CodecSpec(codec, bits, group_size, config.rounding, centre=keeps_mean)
        for codec, widths in _ALLOWED[config.codec].items()
        for group_size, keeps_mean in _groups(codec, config, centre)
        for bits in widths
        if bits >= floor
    ]


def least_bits(site: Site, use: SiteUse, config: ActMemConfig) -> int:
    """Return the floor of a site: queries, keys and losses have one.

    Attention is linear in its values: rounding them only adds noise, which is measured.
    """
    if (site.operation, site.role) == ("scaled_dot_product_attention", "value"):
        return 1
    return {"attention": config.attention_bits, "loss": config.loss_bits}.get(use.kind, 1)


def references(specs: Sequence[CodecSpec]) -> list[CodecSpec]:
    """Return the candidates to be measured: one for each codec, and every one of 1 bit, last.

    Of several kinds of groups the first is measured: `regrouped` tells the others.
    """
    groups = {spec.codec: (spec.group_size, spec.centre) for spec in reversed(specs)}
    specs = [spec for spec in specs if (spec.group_size, spec.centre) == groups[spec.codec]]
    firsts: list[CodecSpec] = []
    for codec in dict.fromkeys(spec.codec for spec in specs):
        lossy = sorted((spec for spec in specs if spec.codec == codec and spec.bits > 1), key=lambda spec: spec.bits)
        at_least = [spec for spec in lossy if spec.bits >= _FIRST_BITS.get(codec, 2)]
        firsts += (at_least or lossy)[:1]
    firsts.sort(key=lambda spec: spec.bits)
    return firsts + [spec for spec in specs if spec.bits == 1]


def _groups(codec: str, config: ActMemConfig, centre: bool) -> list[tuple[int, bool]]:
    """Return sizes of groups, and whether they keep their mean; that of the settings first."""
    if codec != "rotated":
        return [(config.group_size, False)]
    sizes = sorted({config.group_size, max(config.group_size, _WIDE_GROUP)})
    # Where means are small, the 2 bytes of each are too many; in small groups larger ones save more.
    return [*((size, centre) for size in sizes), *([(sizes[-1], False)] if centre else [])]
