"""What may be chosen at a site, and what has to be measured for it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_actmem_kernels import CodecSpec

from ..config import ActMemConfig
from ..saved.probe import SiteUse

_ROTATED_BITS = (1, 2, 3, 4)
_UNIFORM_BITS = {"auto": (3, 4, 8), "rotated": (8,), "uniform": (1, 2, 3, 4, 8)}
_RELU_BITS = (2, 3, 4, 8)
# Where a codec's variance is measured first: at the fewest bits that the law holds from.
_FIRST_BITS = {"rotated": 2, "relu": 2, "uniform": 4}


def candidates(use: SiteUse, config: ActMemConfig) -> list[CodecSpec]:
    """Return the codecs that may be chosen at a site, beside keeping it exact.

    Args:
        use: What the site stores.
        config: The settings: the codec, and the floors of attention and loss.
    """
    if use.default.codec == "relu":
        return [_spec("relu", bits, config) for bits in _RELU_BITS]
    specs = [_spec("uniform", bits, config) for bits in _UNIFORM_BITS[config.codec]]
    if config.codec != "uniform":
        specs += [_spec("rotated", bits, config) for bits in _ROTATED_BITS]
    return [spec for spec in specs if spec.bits >= least_bits(use, config)]


def least_bits(use: SiteUse, config: ActMemConfig) -> int:
    """Return the floor of a site: attention and losses have one."""
    return {"attention": config.attention_bits, "loss": config.loss_bits}.get(use.kind, 1)


def references(specs: Sequence[CodecSpec]) -> list[CodecSpec]:
    """Return the candidates to be measured: one for each codec, and every one of 1 bit, last."""
    firsts: list[CodecSpec] = []
    for codec in dict.fromkeys(spec.codec for spec in specs):
        lossy = sorted((spec for spec in specs if spec.codec == codec and spec.bits > 1), key=lambda spec: spec.bits)
        at_least = [spec for spec in lossy if spec.bits >= _FIRST_BITS[codec]]
        firsts += (at_least or lossy)[:1]
    firsts.sort(key=lambda spec: spec.bits)
    return firsts + [spec for spec in specs if spec.bits == 1]


def _spec(codec: str, bits: int, config: ActMemConfig) -> CodecSpec:
    return CodecSpec(codec, bits, config.group_size, config.rounding)
