"""Chains of element-wise operations to test with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_actmem import ActMemEngine

SHAPE = (64, 256)

BYTES = 64 * 256 * 4


def gelu_new(x: Tensor) -> Tensor:
    """GELU as Hugging Face writes it out for GPT-2."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def named_steps(a: Tensor, b: Tensor) -> Tensor:
    """Every intermediate result stays alive until the function returns."""
    gate = torch.sigmoid(a)
    scaled = gate * 2
    shifted = scaled - 1
    return shifted * b


CHAINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    # and how many tensors are kept
    "gelu_new": (lambda a, b: gelu_new(a), 1),
    "mish": (lambda a, b: a * torch.tanh(F.softplus(a)), 1),
    "quick gelu": (lambda a, b: a * torch.sigmoid(1.702 * a), 1),
    "swiglu": (lambda a, b: F.silu(a) * b, 2),
    "geglu, scaled": (lambda a, b: (F.gelu(a) * b) * 0.5 + 1, 2),
    "named steps": (named_steps, 2),
    "polynomial": (lambda a, b: a * a * a - 2 * a * a + 3 * a, 1),
    "product of two chains": (lambda a, b: torch.tanh(a) * torch.sigmoid(b), 2),
    "sum over common roots": (lambda a, b: F.silu(a) * b + torch.sigmoid(b) * a, 2),
    "difference of one root": (lambda a, b: torch.exp(-a.square()) - torch.tanh(a), 1),
    "cancelled": (lambda a, b: torch.tanh(a) + b - b, 1),
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(SHAPE, dtype=dtype, requires_grad=True), torch.randn(SHAPE, dtype=dtype, requires_grad=True)


def engine_of(bits: int = 32, **settings: Any) -> ActMemEngine:
    return ActMemEngine(bits=bits, activations="derivative", **settings)


def saved_bytes(engine: ActMemEngine) -> int:
    engine.ledger.settle()
    return engine.ledger.live_saved_bytes


def raw_bytes(engine: ActMemEngine) -> int:
    engine.ledger.settle()
    return engine.ledger.live_raw_bytes


def gradients(
    compute: Callable[[Tensor, Tensor], Tensor], roots: tuple[Tensor, ...], engine: ActMemEngine | None
) -> tuple[Tensor | None, ...]:
    a, b = (root * 1 for root in roots)
    if engine is None:
        out = compute(a, b)
    else:
        with engine.compress():
            out = compute(a, b)
    return torch.autograd.grad(
        out, roots, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out), allow_unused=True
    )
