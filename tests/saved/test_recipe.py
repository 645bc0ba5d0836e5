"""Recipes: arguments with slots, filled again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_actmem.saved.recipe import Autocast, Recipe, tensors_of, with_slots

A, B = torch.randn(4, 4), torch.randn(4, 4)
CALLS: list[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = [
    (torch.add, (A, B), {"alpha": 2}),
    (torch.cat, ([A, B], 1), {}),
    (torch.stack, ((A, B),), {"dim": 1}),
    (F.layer_norm, (A, (4,)), {"weight": B[0], "bias": B[1]}),
    (torch.where, (A > 0, A, 0.5), {}),
    (Tensor.to, (A, torch.bfloat16), {}),
    (F.gelu, (), {"input": A, "approximate": "tanh"}),
]


@pytest.mark.parametrize(("function", "arguments", "keywords"), CALLS)
def test_a_call_can_be_run_again(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    state = Autocast.now("cpu")
    assert state is not None
    slots, named_slots = with_slots((arguments, keywords))
    recipe = Recipe(function, slots, named_slots, state)
    tensors = list(tensors_of([arguments, keywords]))
    assert torch.equal(recipe.run(tensors), function(*arguments, **keywords))
    assert not list(tensors_of([slots, named_slots]))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("now", [False, True])
@pytest.mark.parametrize("then", [False, True])
def test_it_runs_as_in_the_forward_whatever_holds_in_backward(then: bool, now: bool, grad: bool) -> None:
    """Where autocast and gradient are off already, their contexts are left out."""
    weight = B.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=then):
        state = Autocast.now("cpu")
        expected = torch.mm(A, B)
    assert state is not None
    slots, _ = with_slots(((A, weight), {}))
    with torch.autocast("cpu", torch.bfloat16, enabled=now), torch.set_grad_enabled(grad):
        result = Recipe(torch.mm, slots, {}, state).run([A, weight])
        assert torch.is_autocast_enabled("cpu") is now
    assert result.dtype == (torch.bfloat16 if then else torch.float32)
    assert torch.equal(result, expected)
    assert not result.requires_grad


def test_an_operation_in_place_runs_on_a_copy() -> None:
    state = Autocast.now("cpu")
    assert state is not None
    slots, _ = with_slots(((A, 2), {}))
    before = A.clone()
    assert torch.equal(Recipe(Tensor.mul_, slots, {}, state, inplace=True).run([A]), before * 2)
    assert torch.equal(A, before)


def test_autocast_is_none_where_there_is_none() -> None:
    assert Autocast.now("meta") is None
