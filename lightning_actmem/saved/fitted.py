"""Codecs fitted to what a tensor is."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from lightning_actmem_kernels import CodecSpec
from lightning_actmem_kernels.spec import GROUP_SIZES


@lru_cache(maxsize=256)
def within_rows(spec: CodecSpec, width: int) -> CodecSpec:
    """Return the codec with groups that end where rows do, if any allowed size divides their width.

    A norm divides by what a row scatters by: beside other rows in one group the nothing that a padded position is came
    back as half a step, times 316 at the usual epsilon (at 4 bits 50 times the gradient of a norm over 64).
    """
    size = spec.group_size
    while width % size and size > GROUP_SIZES[0]:
        size //= 2
    return spec if width % size else replace(spec, group_size=size)


@lru_cache(maxsize=256)
def of_derivatives(spec: CodecSpec, bounds: tuple[float, float] | None) -> CodecSpec:
    """Return the codec for derivatives that is as wide as the codec for any activation."""
    if bounds is not None:
        return CodecSpec("fixed", spec.bits, spec.group_size, spec.rounding, low=bounds[0], high=bounds[1])
    # Those of an activation lie around 1/2: without their mean a rotated group of gelu_new has half the error.
    return replace(spec, centre=True) if spec.codec == "rotated" else spec
