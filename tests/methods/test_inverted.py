"""GELU and SiLU from their output and one bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.methods.inverted import GELU, GELU_TANH, SILU, Inversion
from lightning_actmem_kernels import CodecSpec

SHAPE = (64, 256)
BYTES = 64 * 256 * 4

# Largest absolute errors of the published approximants on [-12, 12], in float64.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Inversion, float]] = {
    "gelu": (F.gelu, GELU, 0.0187),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), GELU_TANH, 0.0187),
    "silu": (F.silu, SILU, 0.0030),
}


@pytest.mark.parametrize("name", CASES)
def test_the_error_of_the_derivative(name: str) -> None:
    function, inversion, bound = CASES[name]
    x = torch.linspace(-12, 12, 1_200_001, dtype=torch.float64, requires_grad=True)
    y = function(x)
    (exact,) = torch.autograd.grad(y.sum(), x)
    error = (inversion.derivative(y.detach(), x.detach() < inversion.minimum) - exact).abs()
    assert 0.9 * bound < float(error.max()) < bound


@pytest.mark.parametrize("name", CASES)
def test_the_minimum_is_where_the_derivative_changes_sign(name: str) -> None:
    function, inversion, _ = CASES[name]
    x = (inversion.minimum + torch.tensor([-1e-6, 1e-6], dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    assert slope[0] < 0 < slope[1]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_gradients_with_an_exact_output(name: str, memory_format: torch.memory_format) -> None:
    function, _, bound = CASES[name]
    for shape, dtype in (((5000,), torch.float32), ((7, 11, 13, 3), torch.float64), ((7, 11, 13, 3), torch.bfloat16)):
        x = torch.randn(shape, dtype=dtype) * 2
        if len(shape) == 4:
            x = x.to(memory_format=memory_format)
        x.requires_grad_()
        plain = function(x)
        with ActMemEngine(bits=32, activations="inverted").compress():
            out = function(x * 1)
        assert torch.equal(out, plain)
        assert out.stride() == plain.stride()
        expected, found = (torch.autograd.grad(y.float().sum(), x)[0] for y in (plain, out))
        assert found.dtype == dtype
        assert (
            float((found - expected).abs().max()) < bound + 2 * torch.finfo(dtype).eps + (dtype is torch.bfloat16) * 0.3
        )


def saved(engine: ActMemEngine) -> dict[str, tuple[str, int]]:
    return {f"{s.operation}.{s.role}": (row.codec, row.saved_bytes) for s, row in engine.ledger.sites.items()}


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()])
def test_the_next_layer_shares_the_output(activation: nn.Module) -> None:
    model = nn.Sequential(activation, nn.Linear(256, 256))
    engine = ActMemEngine(bits=4, activations="inverted")
    with engine.compress(model):
        out = model(torch.randn(SHAPE, requires_grad=True) * 1)
    name = type(activation).__name__.lower()
    packed = CodecSpec("uniform", 4).stored_bytes(64 * 256, torch.float32)
    found = saved(engine)
    assert found.pop("linear.weight") == ("exact", 256 * 256 * 4)
    assert found == {
        f"{name}.result": ("uniform-4", packed),
        f"{name}.mask": ("mask-1", 64 * 256 // 8),
        "linear.input": ("shared", 0),
    }
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == packed + 64 * 256 // 8
    assert engine.ledger.live_raw_bytes == 2 * BYTES  # input and output
    del out
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == engine.ledger.live_raw_bytes == 0


def test_other_functions_are_left_alone() -> None:
    engine = ActMemEngine(bits=4, activations="inverted")
    x = torch.randn(SHAPE, requires_grad=True)
    with engine.compress():
        held = F.mish(x * 1), F.silu(x * 1, inplace=True), F.gelu((x * 1)[:2, :4])
    assert not any(name.endswith("mask") for name in saved(engine))
    assert all(y.requires_grad for y in held)


@pytest.mark.parametrize("settings", [{"exact": ("op:gelu",)}, {"min_elements": 1 << 20}])
def test_what_stays_exact(settings: dict[str, Any]) -> None:
    engine = ActMemEngine(bits=2, activations="inverted", **settings)
    with engine.compress():
        F.gelu(torch.randn(SHAPE, requires_grad=True) * 1)
    assert saved(engine) == {"gelu.input": ("exact", BYTES)}


@pytest.mark.parametrize("name", CASES)
def test_gradients_stay_bounded_when_the_output_is_rounded(name: str) -> None:
    """A rounded output may lie below the minimum, or far from where its bit says."""
    function, _, _ = CASES[name]
    x = (torch.randn(SHAPE) * 3).requires_grad_()
    for bits in (1, 2, 4, 8):
        with ActMemEngine(bits=bits, activations="inverted").compress():
            out = function(x * 1)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert bool(grad.isfinite().all())
        assert float(grad.abs().max()) < 2


def test_without_gradient_nothing_is_saved() -> None:
    engine = ActMemEngine(activations="inverted")
    with engine.compress(), torch.no_grad():
        out = F.gelu(torch.randn(SHAPE, requires_grad=True) * 1)
    assert not out.requires_grad
    assert engine.ledger.sites == {}
