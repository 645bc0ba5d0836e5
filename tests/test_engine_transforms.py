"""Forward-mode derivatives and ``vmap`` inside a step: as in plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_actmem import ActMemEngine

SETTINGS: list[dict[str, Any]] = [
    {"bits": 32},
    {"bits": 32, "derive": True},
    {"bits": 8},
    {"bits": 8, "activations": "derivative"},
    {"bits": 8, "activations": "inverted"},
]
ROUNDING = 1e-4


def gradients(model: nn.Module, loss: Any, engine: ActMemEngine | None, x: Tensor) -> Tensor:
    model.zero_grad()
    torch.manual_seed(1)
    if engine is None:
        value = loss(model, x)
    else:
        with engine.compress(model, inputs=x):
            value = loss(model, x)
    value.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


def tangent_loss(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
        return primal.square().mean() + tangent.square().mean()


# torch registers the derivatives of forward mode by its deprecated scripting when they are first asked for.
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_forward_mode(settings: dict[str, Any]) -> None:
    """Tangents are saved by the operations of their primals: derived like these they gave wrong gradients, silently."""
    layers = [nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.Tanh()]
    model, x = nn.Sequential(*layers, nn.Hardtanh(-0.5, 0.5), nn.SiLU()), torch.randn(64, 32)
    assert torch.equal(
        gradients(model, tangent_loss, ActMemEngine(**settings), x), gradients(model, tangent_loss, None, x)
    )


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, torch.relu, torch.exp, torch.nn.functional.gelu])
def test_vmap(function: Any, settings: dict[str, Any]) -> None:
    """Its batched tensors have the type of any other, and no storage."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: function(model(row)))(x).square().mean()

    model, x = nn.Linear(32, 32), torch.randn(64, 32)
    packed, plain = (gradients(model, loss, engine, x) for engine in (ActMemEngine(**settings), None))
    assert (packed - plain).square().sum() <= ROUNDING * plain.square().sum()
