"""Prints what element-wise operations may keep for backward, and what that does to gradients, as a table in Markdown.

Run ``python -m benchmarks.activations``. ``y = W f(x)`` with x from N(0, 1), as in a transformer's MLP: f saves
something and so does the linear layer, which shares or derives what it can. For each setting: bits stored per element
of x, all metadata included, for f alone and together with the layer; squared bias and variance of the gradients of x
and of W over their squared size, from several draws of the noise. Derivation stands twice, with the codec for any
tensor at that width (``auto``) and with min-max groups.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine

ROWS, WIDTH = 512, 256
MODES: dict[str, dict[str, Any]] = {
    "derive": {},
    "derive, min-max": {"codec": "uniform"},
    "derivative": {"activations": "derivative"},
    "inverted": {"activations": "inverted"},
}


def gelu_new(x: Tensor) -> Tensor:
    """GELU as written out in GPT-2."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"GELU": F.gelu, "SiLU": F.silu, "gelu_new": gelu_new}


def bias_and_variance(exact: Tensor, draws: list[Tensor]) -> tuple[float, float]:
    """Return squared bias and variance of an estimate, relative to the exact value's squared size."""
    errors = torch.stack(draws).double() - exact
    size = exact.double().square().sum()
    variance = errors.var(0).sum() / size
    return float(errors.mean(0).square().sum() / size - variance / len(draws)), float(variance)


def stored_bits(engine: ActMemEngine, elements: int) -> float:
    """Return the bits per element that are stored now."""
    engine.ledger.settle()
    return engine.ledger.live_saved_bytes * 8 / elements


def measure(function: Callable[[Tensor], Tensor], draws: int, settings: dict[str, Any]) -> dict[str, float]:
    """Return bits per element of x for f alone and with its layer, then bias and variance for x and for W.

    Args:
        function: f.
        draws: How often to pack with other noise.
        settings: The engine's.
    """
    torch.manual_seed(0)
    x, weight = torch.randn(ROWS, WIDTH, requires_grad=True), nn.Parameter(torch.randn(WIDTH, WIDTH) / 16)
    grad = torch.randn(ROWS, WIDTH)
    exact = torch.autograd.grad(F.linear(function(x * 1), weight), (x, weight), grad)
    engine = ActMemEngine(settings)
    with engine.compress():
        alone = function(x * 1)
    found = {"alone": stored_bits(engine, alone.numel())}
    del alone
    estimates = []
    for _ in range(draws):
        with engine.compress():
            out = F.linear(function(x * 1), weight)
        found["with layer"] = stored_bits(engine, x.numel())
        estimates.append(torch.autograd.grad(out, (x, weight), grad))
        del out
    for name, value, drawn in zip(("dx", "dW"), exact, zip(*estimates, strict=True), strict=True):
        found[f"{name}: bias²"], found[f"{name}: variance"] = bias_and_variance(value, list(drawn))
    return found


def main() -> None:
    """Measure every setting and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--draws", type=int, default=64)
    options = parser.parse_args()
    print("| f | keeps | bits | alone | with layer | dx: bias² | dx: variance | dW: bias² | dW: variance |")
    print("|---" * 9 + "|")
    for (name, function), (mode, settings) in itertools.product(FUNCTIONS.items(), MODES.items()):
        if name == "gelu_new" and mode == "inverted":
            continue  # open-coded: nothing to invert
        for bits in options.bits:
            found = measure(function, options.draws, {**settings, "bits": bits})
            stored = f"{found.pop('alone'):.2f} | {found.pop('with layer'):.2f}"
            cells = " | ".join(f"{max(error, 0.0):.1e}" for error in found.values())
            print(f"| {name} | {mode} | {bits} | {stored} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
