"""The figures that the default of the setting ``activations`` rests on."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.activations import FUNCTIONS, MODES, measure

DRAWS = 8


def test_derivation_at_4_bits_takes_the_bytes_of_derivatives_at_2_with_less_variance() -> None:
    """The layer after an activation keeps its output, unless that is derived from the input too."""
    for function in FUNCTIONS.values():
        derived = measure(function, DRAWS, {**MODES["derive"], "bits": 4})
        derivative = measure(function, DRAWS, {**MODES["derivative"], "bits": 2})
        assert derived["with layer"] < 1.03 * derivative["with layer"]
        for name in ("dx", "dW"):
            both = derived[f"{name}: bias²"] + derived[f"{name}: variance"]
            assert both < 0.5 * derivative[f"{name}: variance"]


def test_alone_the_derivative_is_the_better_choice() -> None:
    derived, derivative = (measure(F.gelu, DRAWS, {**MODES[mode], "bits": 2}) for mode in ("derive", "derivative"))
    assert derivative["alone"] < derived["alone"]
    assert derivative["dx: variance"] < 0.6 * derived["dx: variance"]


def test_inverted_activations_are_biased() -> None:
    found = measure(F.gelu, DRAWS, {**MODES["inverted"], "bits": 4})
    assert found["dx: bias²"] > 5e-4
    assert found["with layer"] - found["alone"] == 0  # the layer shares the output
