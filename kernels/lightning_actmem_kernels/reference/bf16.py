"""float32 rounded to bfloat16 by integer operations on the bits, outward or to nearest.

A grid whose minimum is rounded down and whose step is rounded up still covers its group, so codes need no clamp.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

# Between these 256 / step and step / 256 are normal numbers, which no device or mode flushes to zero.
LARGEST_STEP = 2.0**126
SMALLEST_STEP_BITS = 0x04800000  # 2**-118
HIGH_HALF = -0x10000
LOW_HALF = 0xFFFF
NAN_BITS = 0x7FC00000


def round_down(x: Tensor) -> Tensor:
    """Largest bfloat16 not above x.

    Args:
        x: float32, any shape.

    Returns:
        int32, the bits of a float32 whose low half is zero; -0.0 becomes 0.0.
    """
    bits = (x + 0.0).view(torch.int32)
    # Towards -inf is away from zero where the sign bit is set: there bits >> 31 is all ones.
    return (bits + ((bits >> 31) & LOW_HALF)) & HIGH_HALF


def round_nearest(x: Tensor) -> Tensor:
    """The bfloat16 nearest to x, ties to even.

    Args:
        x: float32, any shape, not NaN.

    Returns:
        int32, the bits of a float32 whose low half is zero.
    """
    bits = x.view(torch.int32)
    return (bits + ((bits >> 16) & 1) + 0x7FFF) & HIGH_HALF


@lru_cache
def reciprocal_below(n: int) -> float:
    """Largest float32 not above 1 / n, so that a span of exactly n steps of few bits rounds up to that step."""
    nearest = torch.tensor(1.0 / n)
    return float(nearest if Fraction(float(nearest)) * n <= 1 else torch.nextafter(nearest, torch.tensor(0.0)))


def step_bits(span: Tensor, intervals: int) -> Tensor:
    """Smallest bfloat16 step of which `intervals` cover `span`: 0, or in [2**-118, 2**126], or NaN beyond.

    Args:
        span: float32, non-negative, or non-finite where the group is.
        intervals: Steps between the lowest and the highest level.

    Returns:
        int32, the bits of a float32 whose low half is zero.
    """
    step = span * reciprocal_below(intervals)
    rounded_up = (step.view(torch.int32) + LOW_HALF) & HIGH_HALF
    # A denormal step could not be inverted: 1 / step would be inf.
    rounded_up = torch.where(span > 0, rounded_up.clamp_min(SMALLEST_STEP_BITS), 0)
    return torch.where(step <= LARGEST_STEP, rounded_up, NAN_BITS)


def inverse(step: Tensor) -> Tensor:
    """1 / step, and 0 where the step is 0 or NaN."""
    return torch.where(step > 0, step.reciprocal(), 0.0)
