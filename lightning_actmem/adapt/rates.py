"""How the variance of a codec's error falls with its bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_actmem_kernels import CodecSpec

# E|x' - x|^2 / |x|^2, measured on a million normal numbers in groups of 256 (relu: their positive part; fixed: numbers
# from 0 to 1); a test measures again. Between group sizes the figures differ, their ratios by less than 7 %.
RATES: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("rotated", "dither"): {1: 5.703e-1, 2: 1.319e-1, 3: 3.529e-2, 4: 9.416e-3},
    ("uniform", "dither"): {1: 2.719, 2: 3.017e-1, 3: 5.535e-2, 4: 1.207e-2, 5: 2.829e-3, 6: 6.840e-4, 8: 4.179e-5},
    ("uniform", "stochastic"): {1: 7.081, 2: 6.020e-1, 3: 1.101e-1, 4: 2.398e-2, 5: 5.628e-3, 6: 1.367e-3, 8: 8.373e-5},
    ("uniform", "nearest"): {1: 4.508, 2: 3.024e-1, 3: 5.497e-2, 4: 1.200e-2, 5: 2.812e-3, 6: 6.813e-4, 8: 4.180e-5},
    ("relu", "dither"): {2: 1.442e-1, 3: 1.802e-2, 4: 3.405e-3, 8: 1.060e-5},
    ("relu", "stochastic"): {2: 3.225e-1, 3: 3.690e-2, 4: 6.870e-3, 8: 2.119e-5},
    ("relu", "nearest"): {2: 1.548e-1, 3: 1.826e-2, 4: 3.415e-3, 8: 1.058e-5},
    ("fixed", "dither"): {1: 2.497e-1, 2: 2.773e-2, 3: 5.091e-3, 4: 1.111e-3, 8: 3.846e-6},
    ("fixed", "stochastic"): {1: 4.997e-1, 2: 5.554e-2, 3: 1.020e-2, 4: 2.223e-3, 8: 7.700e-6},
    ("fixed", "nearest"): {1: 2.498e-1, 2: 2.780e-2, 3: 5.103e-3, 4: 1.110e-3, 8: 3.850e-6},
    ("bfp", "dither"): {2: 1.404, 3: 2.114e-1, 4: 2.838e-2, 8: 8.607e-5},
    ("bfp", "stochastic"): {2: 2.240, 3: 4.212e-1, 4: 5.670e-2, 8: 1.722e-4},
    ("bfp", "nearest"): {2: 8.679e-1, 3: 2.101e-1, 4: 2.840e-2, 8: 8.608e-5},
}


def rate(spec: CodecSpec) -> float | None:
    """Return the error's variance relative to a normal tensor's square, or ``None`` for a codec without a table."""
    rounding = "dither" if spec.codec == "rotated" else spec.rounding
    return RATES.get((spec.codec, rounding), {}).get(spec.bits)


def rescaled(variance: float, measured: CodecSpec, wanted: CodecSpec) -> float | None:
    """Scale what was measured at one width to another width of the same codec.

    Widths of 1 bit count for themselves alone: the error is no longer small there, and laws fitted to it have ranked
    queries and keys catastrophically.

    Args:
        variance: The gradient's variance with the tensor stored by ``measured``.
        measured: The codec it was measured with.
        wanted: The codec that is asked about.

    Returns:
        The variance, or ``None`` where the measurement does not tell.
    """
    if measured == wanted:
        return variance
    known, asked = rate(measured), rate(wanted)
    if measured.codec != wanted.codec or replace(measured, bits=wanted.bits) != wanted:
        return None
    if 1 in (measured.bits, wanted.bits) or known is None or asked is None:
        return None
    return variance * asked / known
