"""Element-wise operations keep what is chosen for their layer, class or name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from tests.methods.support import SHAPE, gelu_new


class Gated(nn.Module):
    """SwiGLU without its linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * x


def model() -> nn.Sequential:
    return nn.Sequential(nn.GELU(), nn.Sequential(nn.GELU(), nn.SiLU()), Gated())


def kept(**settings: object) -> dict[str, set[str]]:
    """Return by layer what its operations keep: their names and roles."""
    engine, net = ActMemEngine(bits=32, derive=False, **settings), model()
    with engine.compress(net):
        out = net(torch.randn(SHAPE, requires_grad=True) * 1)
    out.sum().backward()
    found: dict[str, set[str]] = {}
    for site in engine.ledger.sites:
        found.setdefault(site.layer, set()).add(f"{site.operation}.{site.role}")
    return found


DERIVED = {
    "0": {"gelu.input"},
    "1.0": {"gelu.input"},
    "1.1": {"silu.input"},
    "2": {"silu.input", "mul.input", "mul.other"},
}


def test_without_a_choice_every_layer_has_the_same() -> None:
    assert kept() == DERIVED
    assert kept(layer_activations={"nowhere": "derivative"}) == DERIVED


def test_layers_classes_and_operations_choose_for_themselves() -> None:
    found = kept(layer_activations={"1": "derivative", "type:Gated": "derivative", "1.1": "inverted"})
    assert found == {
        "0": {"gelu.input"},
        "1.0": {"gelu.derivative"},
        "1.1": {"silu.result", "silu.mask"},
        "2": {"silu.derivative", "mul.derivative"},  # the first lives until the second is there
    }


def test_the_last_pattern_that_matches_wins() -> None:
    found = kept(activations="inverted", layer_activations={"op:gelu": "derivative", "1.*": "derive"})
    assert found["0"] == {"gelu.derivative"}
    assert found["1.0"] == {"gelu.input"}
    assert found["1.1"] == {"silu.input"}
    assert {"silu.result", "silu.mask"} <= found["2"]


def test_a_chain_ends_where_another_method_begins() -> None:
    """Gradients are right across the border, also where a chain's result enters an operation of another method."""
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    net = nn.Sequential(nn.Tanh(), nn.Sigmoid(), nn.GELU())
    engine = ActMemEngine(bits=32, layer_activations={"0": "derivative", "2": "derivative"})
    with engine.compress(net):
        out = gelu_new(net(x * 1))
    (found,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(gelu_new(net(x)).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activations", ["derive", "derivative", "inverted"])
def test_only_methods_in_use_replace_operations(activations: str) -> None:
    engine = ActMemEngine(layer_activations={"head": activations})
    replaced = set(engine._tracker.replacements) - {F.scaled_dot_product_attention}
    assert (F.gelu in replaced, F.sigmoid in replaced) == (activations != "derive", activations == "derivative")
