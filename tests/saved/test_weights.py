"""Casts of weights: made again in backward, so that autograd keeps none of them alive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.saved.weights import is_weight, recast

STEPS: dict[str, Callable[[nn.Parameter, Tensor], Tensor]] = {
    "linear": lambda weight, x: F.linear(x.transpose(1, 3), weight),
    "convolution": lambda weight, x: F.conv2d(x, weight),
    "transposed convolution": lambda weight, x: F.conv_transpose2d(x, weight),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_gradients_are_bit_equal_and_no_cast_is_kept(step: Callable[[nn.Parameter, Tensor], Tensor]) -> None:
    weight = nn.Parameter(torch.randn(16, 16) if step is STEPS["linear"] else torch.randn(16, 16, 3, 3))
    x = torch.randn(4, 16, 8, 8, requires_grad=True)

    def run(engine: ActMemEngine | None) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            if engine is None:
                loss = step(weight, x * 1).float().square().sum()
            else:
                with engine.compress():
                    loss = step(weight, x * 1).float().square().sum()
        return torch.autograd.grad(loss, [weight, x])

    engine = ActMemEngine(bits=32, derive=True, min_elements=0)
    assert all(map(torch.equal, run(engine), run(None)))
    weights = [row for row in engine.ledger.sites.values() if row.kind == "weight"]
    assert weights
    assert all((row.codec, row.saved_bytes) == ("derived", 0) for row in weights)


def test_a_weight_changed_before_backward_is_an_error() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), ActMemEngine(bits=4, min_elements=0).compress():
        loss = F.linear(x * 1, weight).float().sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_lossless_training_without_derivation_keeps_what_autograd_keeps() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), ActMemEngine(bits=32).compress():
        loss = F.linear(x * 1, weight).float().sum()
    expected = weight.detach().bfloat16().sum(0)
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(torch.autograd.grad(loss, x)[0][0].bfloat16(), expected)


def changed(weight: Tensor) -> Tensor:
    cast = weight.bfloat16()
    with torch.no_grad():
        cast.sign_()
    return cast


def test_weights_that_are_transposed_or_binarised_after_the_cast() -> None:
    weight = nn.Parameter(torch.randn(32, 32))
    x = torch.randn(8, 32, requires_grad=True)
    for make in (
        lambda w: w.bfloat16().t().contiguous(),
        lambda w: changed(w),
        lambda w: w.bfloat16().t().reshape(16, 64),
    ):
        h = x if make(weight).shape[1] == 32 else x.view(4, 64)

        def step(make=make, h=h) -> Tensor:
            return F.linear(h.bfloat16(), make(weight)).float().square().sum()

        with ActMemEngine(bits=32, derive=True, min_elements=0).compress():
            loss = step()
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(step(), x)[0])


@pytest.mark.parametrize(
    ("make", "weight", "again"),
    [
        (lambda w: w, True, False),
        (lambda w: w.transpose(0, 1), True, False),
        (lambda w: w.bfloat16(), True, True),
        (lambda w: w.bfloat16().transpose(0, 1), True, True),
        (lambda w: w.transpose(0, 1).bfloat16(), True, False),
        (lambda w: w.bfloat16()[2:5], True, True),
        (lambda w: w[2:5].bfloat16(), True, False),
        (lambda w: w.bfloat16().float(), True, False),
        (lambda w: w.bfloat16() * 1, False, False),
    ],
    ids=[
        "itself",
        "view",
        "cast",
        "view of a cast",
        "cast of a view",
        "part",
        "cast of a part",
        "there and back",
        "product",
    ],
)
def test_what_is_cast_again(make: Callable[[Tensor], Tensor], weight: bool, again: bool) -> None:
    parameter = nn.Parameter(torch.randn(6, 4, 2, 2))
    tensor = make(parameter)
    handle = recast(tensor)
    assert is_weight(tensor) is weight
    assert (handle is not None) is again
    if handle is not None:
        expected, weak = tensor.detach().clone(), tensor.untyped_storage()._weak_ref()  # type: ignore[attr-defined]
        geometry = tensor.stride(), tensor.dtype
        del tensor
        assert torch.UntypedStorage._new_with_weak_ptr(weak) is None  # the handle keeps nothing of it
        torch.UntypedStorage._free_weak_ref(weak)
        restored = handle.restore()
        assert torch.equal(restored, expected)
        assert (restored.stride(), restored.dtype) == geometry


@pytest.mark.parametrize("cached", [False, True], ids=["cast by hand", "autocast's own"])
def test_a_weight_that_changes_between_its_cast_and_its_use(cached: bool) -> None:
    """The cast has what was there before, and is kept: made again it would have what is there now."""
    layer, x = nn.Linear(32, 32, bias=False), torch.randn(64, 32, requires_grad=True)
    before = layer.weight.detach().clone()

    def step() -> Tensor:
        h = x * 2
        with torch.autocast("cpu", torch.bfloat16, enabled=cached):
            if cached:
                layer(h.detach())  # makes the cast
            cast = None if cached else layer.weight.bfloat16()
            with torch.no_grad():
                layer.weight.mul_(-1.5)
            return (layer(h) if cast is None else F.linear(h.bfloat16(), cast)).float().square().sum()

    grads = []
    for engine in (None, ActMemEngine(bits=32, derive=True)):
        with torch.no_grad():
            layer.weight.copy_(before)
        if engine is None:
            loss = step()
        else:
            with engine.compress(layer, inputs=x):
                loss = step()
        grads.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*grads)
