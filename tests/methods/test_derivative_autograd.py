"""Chains that keep their derivative, and what autograd promises: changes in place, hooks, double backward, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_actmem import ActMemEngine, ActMemError
from tests.methods.support import (
    BYTES,
    SHAPE,
    engine_of,
    gelu_new,
    raw_bytes,
    saved_bytes,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivatives_have_the_dtype_of_the_operation(dtype: torch.dtype) -> None:
    engine = engine_of()
    x = torch.randn(SHAPE, requires_grad=True)
    with engine.compress():
        half = x.to(dtype)
        out = F.silu(half) * half
    assert out.dtype == dtype
    assert saved_bytes(engine) == BYTES // 2
    (grad,) = torch.autograd.grad(out.sum(), x)
    (plain,) = torch.autograd.grad((F.silu(x) * x).sum(), x)
    assert grad.dtype == torch.float32
    assert float((grad - plain).abs().max()) < 0.1


def test_under_autocast() -> None:
    """Where autocast changes the dtype, a chain begins anew and gradients have their root's dtype."""
    layer = nn.Linear(256, 256)
    x = torch.randn(SHAPE)
    results = []
    for engine in (None, engine_of()):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if engine is None:
                out = F.gelu(torch.tanh(layer(x)) ** 3)
            else:
                with engine.compress(layer, inputs=x):
                    out = F.gelu(torch.tanh(layer(x)) ** 3)
        out.float().sum().backward()
        results.append((out.dtype, layer.weight.grad.clone()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.5)


def test_nothing_changes_without_gradient() -> None:
    engine = engine_of()
    x = torch.randn(SHAPE)
    with engine.compress():
        F.gelu(x)
        with torch.no_grad():
            out = F.gelu(x.requires_grad_() * 1)
    assert not out.requires_grad
    assert engine.ledger.sites == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_it_steps_aside(reentrant: bool) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    (plain,) = torch.autograd.grad(gelu_new(x * 1).sum(), x)
    engine = engine_of()
    with engine.compress():
        loss = checkpoint(gelu_new, x * 1, use_reentrant=reentrant).sum()
    assert not any(site.role == "derivative" for site in engine.ledger.sites)
    loss.backward()
    assert torch.equal(x.grad, plain)


def test_other_hooks_and_pauses_are_respected() -> None:
    engine = engine_of()
    x = torch.randn(SHAPE, requires_grad=True)
    with engine.compress():
        with torch.autograd.graph.save_on_cpu():
            F.gelu(x * 1)
        with engine.paused():
            F.gelu(x * 1)
    assert engine.ledger.sites == {}


@pytest.mark.parametrize(
    ("mode", "function", "name"),
    [("derivative", F.gelu, "gelu"), ("derivative", lambda x: F.silu(x) * x, "mul"), ("inverted", F.silu, "silu")],
)
def test_double_backward_is_refused(mode: str, function: Callable[[Tensor], Tensor], name: str) -> None:
    """Already where the graph for it would be made: later, a part of it might be left out without an error."""
    x = torch.randn(SHAPE, requires_grad=True)
    with ActMemEngine(bits=32, activations=mode).compress():
        loss = function(x * 1).sum()
    with pytest.raises(ActMemError, match=rf"backward of {name} with create_graph=True.*exact=\['op:{name}'\]"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_an_excluded_operation_can_be_differentiated_twice() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with ActMemEngine(bits=4, activations="derivative", exact=["op:gelu"]).compress():
        loss = F.gelu(x * 1).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert float(second.abs().max()) > 0.5


def test_a_retained_graph_gives_the_same_twice() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    engine = engine_of(2)
    with engine.compress():
        loss = gelu_new(x * 1).sum()
        inside = torch.autograd.grad(loss, x, retain_graph=True)[0]
    outside = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    assert all(torch.equal(inside, grad) for grad in outside)


@pytest.mark.parametrize("again", [False, True])
def test_a_chain_does_not_go_past_a_result_that_was_detached_in_place(again: bool) -> None:
    """As a recurrent network detaches its state: nothing of what comes after belongs to what was before."""
    x, y = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))

    def step() -> Tensor:
        state = torch.tanh(x * 1)
        state.detach_().requires_grad_(again)
        return torch.tanh(state * y).sum() + x.sum()

    plain = torch.autograd.grad(step(), [x, y])
    with engine_of().compress():
        loss = step()
    torch.testing.assert_close(torch.autograd.grad(loss, [x, y]), plain)


@pytest.mark.parametrize("again", [False, True])
def test_a_chain_keeps_to_the_graph_when_its_root_is_detached_in_place(again: bool) -> None:
    x = torch.randn(SHAPE, requires_grad=True)

    def step() -> Tensor:
        root = x.flip(0)
        shifted = root + 1
        root.detach_().requires_grad_(again)
        return torch.tanh(shifted).sum()

    plain = torch.autograd.grad(step(), x)
    with engine_of().compress():
        loss = step()
    torch.testing.assert_close(torch.autograd.grad(loss, x), plain)


@pytest.mark.parametrize("observe", ["retain_grad", "hook"])
def test_gradients_of_observed_intermediates(observe: str) -> None:
    """A chain does not go past a result whose gradient somebody has asked for."""
    seen: list[Tensor] = []
    x = torch.randn(SHAPE, requires_grad=True)
    with engine_of().compress():
        middle = torch.tanh(x * 1)
        if observe == "retain_grad":
            middle.retain_grad()
        else:
            middle.register_hook(seen.append)
        out = F.gelu(middle)
    out.sum().backward()
    grad = middle.grad if observe == "retain_grad" else seen[0]
    leaf = middle.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
    assert grad is not None
    torch.testing.assert_close(grad, expected)


def changed_root(x: Tensor) -> Tensor:
    z = x * 1
    out = torch.tanh(z)
    z.mul_(3)
    return out * 2 + z


def changed_result(x: Tensor) -> Tensor:
    out = F.silu(x * 1)
    out.mul_(2).add_(1)
    return torch.sin(out)


def changed_factor(x: Tensor) -> Tensor:
    wave = torch.sin(x * 1)
    out = wave * x.clone()
    wave.zero_()
    return out * 3


def in_place_activation(x: Tensor) -> Tensor:
    return torch.tanh(F.silu(x * 1 + 0.5, inplace=True) * 2)


@pytest.mark.parametrize("compute", [changed_root, changed_result, in_place_activation])
@pytest.mark.parametrize("bits", [32, 4])
def test_changes_in_place_are_noticed(compute: Callable[[Tensor], Tensor], bits: int) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    (plain,) = torch.autograd.grad(compute(x).sum(), x)
    with engine_of(bits, rounding="dither").compress():
        out = compute(x)
    (packed,) = torch.autograd.grad(out.sum(), x)
    error = float((packed - plain).square().mean() / plain.square().mean())
    assert error < (1e-10 if bits == 32 else 0.05)


def test_a_factor_changed_in_place_is_refused_or_was_copied() -> None:
    """As in plain autograd when it is kept by reference; what was packed before is right all the same."""
    x = torch.randn(SHAPE, requires_grad=True)
    with engine_of().compress():
        out = changed_factor(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    leaf = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((torch.sin(leaf) * leaf * 3).sum(), leaf)
    with engine_of(8).compress():
        out = changed_factor(x)
    (packed,) = torch.autograd.grad(out.sum(), x)
    assert float((packed - expected).square().mean() / expected.square().mean()) < 1e-3


def test_weights_broadcasts_and_small_tensors_are_left_alone() -> None:
    scale, shift = nn.Parameter(torch.randn(256)), nn.Parameter(torch.randn(SHAPE))
    x = torch.randn(SHAPE, requires_grad=True)
    engine = engine_of()
    with engine.compress():
        z = x * 1
        out = z * scale, F.softplus(shift), z + shift, z * z.mean(-1, keepdim=True), F.gelu(z[:2, :8])
    assert all(o.requires_grad for o in out)
    assert not any(site.role == "derivative" for site in engine.ledger.sites)


@pytest.mark.parametrize("settings", [{"exact": ("op:gelu",)}, {"exact": ("0",)}, {"min_elements": 1 << 20}])
def test_patterns_and_sizes_that_stay_exact(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.GELU())
    engine = engine_of(2, **settings)
    with engine.compress(model):
        model(torch.randn(SHAPE, requires_grad=True) * 1)
    ((site, row),) = engine.ledger.sites.items()
    assert (site.role, row.codec) == ("input", "exact")


def test_what_a_loss_computes_stays_exact() -> None:
    class MyLoss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(x).mean()

    engine = engine_of(2)
    with engine.compress(model := nn.Sequential(MyLoss())):
        model(torch.randn(SHAPE, requires_grad=True) * 1)
    assert {row.kind for row in engine.ledger.sites.values()} == {"loss"}


def test_a_lasting_result_does_not_keep_its_graph_beyond_the_step() -> None:
    """The map of results that a chain may go on from must not outlive the step."""
    x = torch.randn(SHAPE, requires_grad=True)
    engine = engine_of()
    with engine.compress():
        out = gelu_new(x * 1)
    out = out.detach()
    assert saved_bytes(engine) == raw_bytes(engine) == 0


def test_the_default_mode_replaces_attention_alone() -> None:
    assert list(ActMemEngine()._tracker.replacements) == [F.scaled_dot_product_attention]
    assert ActMemEngine()._methods.replacements == {}


@pytest.mark.gpu
def test_on_a_stream_of_its_own() -> None:
    """A derivative is encoded later than it was computed, but on the stream that has computed it."""
    x = torch.randn(1 << 20, device="cuda", requires_grad=True)
    (plain,) = torch.autograd.grad(gelu_new(x).sum(), x)
    side = torch.cuda.Stream()
    for bits, tolerance in ((32, 1e-5), (8, 0.02)):
        engine = engine_of(bits)
        with engine.compress():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = gelu_new(x * 1)
            torch.cuda.current_stream().wait_stream(side)
            total = out.sum()
        (grad,) = torch.autograd.grad(total, x)
        assert float((grad - plain).abs().max()) < tolerance
