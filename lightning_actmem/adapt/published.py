"""ActNN's and GACT's ways to choose bits, to be compared with ours in one run.

Both store by min-max groups with stochastic rounding and assume ``S_l(b) = C_l / (2^b - 1)^2``. What is theirs is
``C_l``; storing, sharing, derivation and exact signs stay ours.

Sources: Chen et al., "ActNN: reducing training memory footprint via 2-bit activation compressed training", ICML 2021
(sections 3 and 4); Liu et al., "GACT: activation compressed training for generic network architectures", ICML 2022
(section 4).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec

from ..config import ActMemConfig
from ..saved.probe import SiteUse
from ..saved.site import Site
from .candidates import least_bits
from .law import Choices, Found
from .replay import Replay
from .schedule import Target
from .sensitivity import Sensitivities

_OWN_BITS = (2, 4, 8)
_GACT_PROBES = 3


class _LevelLaw:
    """``S(b) = C / (2^b - 1)^2`` with C from the fewest bits."""

    widths: tuple[int, ...] = ()

    def candidates(self, site: Site, use: SiteUse, config: ActMemConfig) -> list[CodecSpec]:
        """Return min-max groups with stochastic rounding, at the published widths that the floors allow."""
        default, floor = use.default, least_bits(site, use, config)
        if default.codec in ("relu", "fixed"):  # a code that the tensor needs
            return [replace(default, bits=bits, rounding="stochastic") for bits in _OWN_BITS if bits >= floor]
        return [CodecSpec("uniform", bits, config.group_size, "stochastic") for bits in self.widths if bits >= floor]

    def variance(self, known: Sensitivities, site: Site, spec: CodecSpec | None) -> float | None:
        """Return what the law makes of the measured width."""
        if spec is None:
            return 0.0
        averages = known.averages.get(site, {})
        measured = next((given for given in averages if given.rounding == spec.rounding == "stochastic"), None)
        if measured is None:
            return None
        return averages[measured].value * (_levels(measured) / _levels(spec)) ** 2


class Gact(_LevelLaw):
    """GACT: the constant from three probes of every tensor at its fewest bits; it takes three passes for each site."""

    widths = (1, 2, 4, 8)

    def without_replay(self, replay: Replay, choices: Choices) -> Found:
        """Return nothing."""
        return {}

    def targets(self, choices: Choices, known: Sensitivities, passes: int) -> list[Target]:
        """Return three probes of every site, however many passes that takes."""
        return [(site, specs[0]) for site, specs in choices.items() if specs] * _GACT_PROBES


class ActNN(_LevelLaw):
    """ActNN: the constant from the ranges of the groups and the size of the gradient behind, without any probe.

    With R the range of an element's group, g the gradient of the operation's output, and T positions in a sample:
    ``C = 1/6 sum_n |g_n|^2 sum_{i in n} R_i^2 / T``. Within a tensor the samples get bits of their own (`by_sample`).
    """

    widths = (1, 2, 3, 4, 8)

    def without_replay(self, replay: Replay, choices: Choices) -> Found:
        """Return the constants, as variances at the fewest bits."""
        found: dict[Site, Tensor] = {}
        for payload, gradient in replay.outputs.gradients():
            if choices[payload.site]:
                constant = _constant(payload.raw(), gradient, choices[payload.site][0].group_size)
                found[payload.site] = found[payload.site] + constant if payload.site in found else constant
        return {site: {choices[site][0]: constant / _levels(choices[site][0]) ** 2} for site, constant in found.items()}

    def targets(self, choices: Choices, known: Sensitivities, passes: int) -> list[Target]:
        """Return nothing."""
        return []


def _levels(spec: CodecSpec) -> int:
    return (1 << spec.bits) - 1


def _constant(flat: Tensor, gradient: Tensor, group_size: int) -> Tensor:
    padding = -flat.numel() % group_size
    groups = torch.cat([flat, flat[-1:].expand(padding)]).float().view(-1, group_size)
    squares = (groups.amax(1) - groups.amin(1)).square()
    samples = gradient.shape[0]
    if flat.numel() % samples:  # not by samples: a table of positions, a pooled feature
        samples = 1
    by_sample = squares.repeat_interleave(group_size)[: flat.numel()].view(samples, -1).sum(1)
    channels = gradient.shape[1] if gradient.dim() > 3 else gradient.shape[-1]
    positions = max(gradient.numel() // (samples * channels), 1)
    sizes = gradient.float().reshape(samples, -1).square().sum(1)
    return (by_sample * sizes).sum() / (6 * positions)
