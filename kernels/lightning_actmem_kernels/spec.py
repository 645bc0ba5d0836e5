"""What a codec is asked to do, and exactly how many bytes it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

WIDTHS: dict[str, tuple[int, ...]] = {
    "identity": (32,),
    "uniform": (1, 2, 3, 4, 5, 6, 8),
    "rotated": (1, 2, 3, 4),
    "relu": (2, 3, 4, 8),
    "bfp": (2, 3, 4, 8),
    "fp8_e4m3": (8,),
    "fp8_e5m2": (8,),
    "fixed": (1, 2, 3, 4, 8),
    "mask": (1,),
    "two_valued": (1,),
    "integer": (4, 8, 16, 32),
}
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
ROUNDINGS = ("dither", "stochastic", "nearest")
FP8 = ("fp8_e4m3", "fp8_e5m2")
# Within these the grid of a range has a step, and an inverse of it, in float32.
LARGEST_BOUND = 2.0**100
NARROWEST = 2.0**-12
# Of each group, beside its codes: a minimum and a step, a scale, an exponent.
_METADATA_BYTES = {"uniform": 4, "rotated": 2, "relu": 2, "bfp": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fixed": 0}
LOSSLESS = frozenset({"identity", "mask", "two_valued", "integer"})


def _one_of(choices: Sequence[object]) -> str:
    *most, last = (str(choice) for choice in choices)
    return f"{', '.join(most)} or {last}"


@dataclass(frozen=True)
class CodecSpec:
    """A codec with its parameters; hashable, so it can key a table.

    Args:
        codec: `uniform` (per-group min-max grid), `rotated` (random rotation to the levels of a normal distribution),
            `relu` (grid whose level 0 is exactly zero), `fixed` (grid from `low` to `high`, without metadata), `bfp`
            (block floating point: signed mantissas under one power of two per group), `fp8_e4m3` and `fp8_e5m2`
            (float8 under one power of two per group), `mask` (bool), `two_valued` (float in {0, s}), `integer`
            (lossless narrowing) or `identity` (a copy).
        bits: Bits per element. uniform: 1, 2, 3, 4, 5, 6, 8; fixed: 1, 2, 3, 4, 8; rotated: 1, 2, 3, 4; relu and bfp:
            2, 3, 4, 8; integer: 4, 8, 16, 32. The other codecs have one width (identity 32, fp8 8, mask and two_valued
            1) and set it whatever is given.
        group_size: Elements that share a grid (uniform, relu), a rotation (rotated) or an exponent (bfp, fp8): a power
            of two from 32 to 1024.
        rounding: How uniform, relu, fixed and bfp round. With u uniform in (0, 1) and v the position on the grid,
            `dither` stores floor(v + u) and restores q + 1/2 - u (error variance step^2/12, unbiased);
            `stochastic` stores floor(v + u) and restores q (variance step^2 f(1 - f), f = v mod 1, unbiased);
            `nearest` stores floor(v + 1/2) and restores q (no noise, biased).
            fp8 has no single step to dither by: there `dither` means `stochastic`.
        centre: Whether rotated keeps the mean of each group apart, for 2 bytes more.
        low: Lowest level of fixed; what lies below is raised to it.
        high: Highest level of fixed; what lies above is lowered to it.

    Raises:
        ValueError: A field is outside its list.
    """

    codec: str
    bits: int = 4
    group_size: int = 256
    rounding: str = "dither"
    centre: bool = False
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields; set those of which a codec has only one."""
        widths = WIDTHS.get(self.codec)
        if widths is None:
            raise ValueError(f"codec must be one of {_one_of(list(WIDTHS))}, got {self.codec!r}. Choose one of these.")
        if len(widths) == 1:
            object.__setattr__(self, "bits", widths[0])
        if self.codec in FP8 and self.rounding == "dither":
            object.__setattr__(self, "rounding", "stochastic")
        if type(self.bits) is not int or self.bits not in widths:
            raise ValueError(
                f"bits must be one of {_one_of(widths)} for codec {self.codec!r}, got {self.bits!r}. "
                "Choose one of these."
            )
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size must be one of {_one_of(GROUP_SIZES)}, got {self.group_size!r}. "
                "Use 256 unless you have measured better."
            )
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"rounding must be one of {_one_of(ROUNDINGS)}, got {self.rounding!r}. "
                "Use 'dither' for the lowest unbiased error."
            )
        if type(self.centre) is not bool:
            raise ValueError(f"centre must be True or False, got {self.centre!r}. Choose one of these.")
        largest = max(abs(self.low), abs(self.high))
        if not (self.high - self.low >= largest * NARROWEST and 1 / LARGEST_BOUND <= largest <= LARGEST_BOUND):
            raise ValueError(
                f"low and high must span a range that float32 can divide, got {self.low!r} and {self.high!r}. "
                "Give the finite range that the values lie in, low end first."
            )

    @property
    def lossless(self) -> bool:
        """Whether decode returns exactly what encode was given."""
        return self.codec in LOSSLESS

    @property
    def label(self) -> str:
        """Codec and bits as reports name them (``"uniform-4"``), or ``"exact"`` for a copy."""
        return "exact" if self.codec == "identity" else f"{self.codec}-{self.bits}"

    def stored_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes of the payload: the sum of `nbytes` over what `encode` returns, metadata included.

        Args:
            numel: Elements of the flat tensor.
            dtype: Its element type (matters only for identity and two_valued).

        Returns:
            The exact number of bytes.
        """
        metadata_bytes = _METADATA_BYTES.get(self.codec)
        if metadata_bytes is not None:
            mean_bytes = 2 if self.centre and self.codec == "rotated" else 0
            return -(-numel // self.group_size) * (self.group_size * self.bits // 8 + metadata_bytes + mean_bytes)
        if self.codec == "identity":
            return numel * dtype.itemsize
        value_bytes = dtype.itemsize if self.codec == "two_valued" else 0
        return -(-numel * self.bits // 8) + value_bytes
