"""What may be chosen at a site, and what has to be measured for it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_actmem_kernels import CodecSpec
from lightning_actmem_kernels.spec import WIDTHS

from ..config import ActMemConfig
from ..saved.probe import SiteUse

# What each setting of the codec allows, with its widths; the codecs that the default takes are among them.
_AUTO = {"uniform": (3, 4, 8), "rotated": (1, 2, 3, 4)}
_ALLOWED: dict[str, dict[str, tuple[int, ...]]] = {
    "auto": _AUTO,
    "measured": _AUTO,
    "rotated": {"uniform": (8,), "rotated": (1, 2, 3, 4)},
    **{codec: {codec: WIDTHS[codec]} for codec in ("uniform", "bfp", "fp8_e4m3", "fp8_e5m2")},
}
# Where a codec's variance is measured first: at the fewest bits that the law holds from.
_FIRST_BITS = {"uniform": 4, "bfp": 3}


def candidates(use: SiteUse, config: ActMemConfig) -> list[CodecSpec]:
    """Return the codecs that may be chosen at a site, beside keeping it exact.

    Args:
        use: What the site stores.
        config: The settings: the codec, and the floors of attention and loss.
    """
    if use.default.codec == "relu":
        return [_spec("relu", bits, config) for bits in WIDTHS["relu"]]
    floor, centre = least_bits(use, config), use.default.codec != "rotated" or use.default.centre
    return [
        _spec(codec, bits, config, centre=codec == "rotated" and centre)
        for codec, widths in _ALLOWED[config.codec].items()
        for bits in widths
        if bits >= floor
    ]


def least_bits(use: SiteUse, config: ActMemConfig) -> int:
    """Return the floor of a site: attention and losses have one."""
    return {"attention": config.attention_bits, "loss": config.loss_bits}.get(use.kind, 1)


def references(specs: Sequence[CodecSpec]) -> list[CodecSpec]:
    """Return the candidates to be measured: one for each codec, and every one of 1 bit, last."""
    firsts: list[CodecSpec] = []
    for codec in dict.fromkeys(spec.codec for spec in specs):
        lossy = sorted((spec for spec in specs if spec.codec == codec and spec.bits > 1), key=lambda spec: spec.bits)
        at_least = [spec for spec in lossy if spec.bits >= _FIRST_BITS.get(codec, 2)]
        firsts += (at_least or lossy)[:1]
    firsts.sort(key=lambda spec: spec.bits)
    return firsts + [spec for spec in specs if spec.bits == 1]


def _spec(codec: str, bits: int, config: ActMemConfig, centre: bool = False) -> CodecSpec:
    return CodecSpec(codec, bits, config.group_size, config.rounding, centre)
