"""The operation tracker: names, arguments, and operations hidden in others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem.saved.operation import operation_of
from lightning_actmem.saved.tracker import NO_CALL, Call, OperationTracker


def names_seen(step: Callable[[Tensor], Any]) -> list[str]:
    """Return the operation's name at every tensor that autograd saves."""
    tracker = OperationTracker()
    seen: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tracker.name())
        return tensor.detach()

    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), tracker:
        step(x)
    assert tracker.name() == ""
    return list(dict.fromkeys(seen))


@pytest.mark.parametrize(
    ("step", "names"),
    [
        (lambda x: x * x, ["mul"]),
        (lambda x: x @ x.t(), ["matmul"]),
        (lambda x: x.detach() @ x.t(), ["matmul"]),
        (lambda x: 2.0**x, ["rpow"]),
        (lambda x: x**2, ["pow"]),
        (lambda x: 2 * x * x, ["mul"]),
        (lambda x: x.clone().mul_(x), ["mul"]),
        (lambda x: x.sigmoid(), ["sigmoid"]),
        (lambda x: F.relu(x), ["relu"]),
        (lambda x: F.relu(x.clone(), inplace=True), ["relu"]),
        (lambda x: torch.einsum("ij,kj->ik", x, x), ["einsum"]),
        (lambda x: F.max_pool1d(x, 2), ["max_pool1d"]),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), ["scaled_dot_product_attention"]),
        (lambda x: nn.MultiheadAttention(8, 2)(x, x, x), ["linear", "bmm", "softmax"]),
        (
            lambda x: nn.MultiheadAttention(8, 2)(x, x, x, need_weights=False),
            ["linear", "scaled_dot_product_attention"],
        ),
    ],
)
def test_names(step: Callable[[Tensor], Any], names: list[str]) -> None:
    seen = names_seen(step)
    assert [name for name in seen if name in names] == names
    assert set(seen) <= {*names, "mul", "view", "transpose"}


def test_an_exception_in_an_operation_ends_it() -> None:
    tracker = OperationTracker()
    with tracker, pytest.raises(RuntimeError):
        torch.ones(2) @ torch.ones(3)
    assert tracker.call is NO_CALL


def running(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Call:
    return Call(operation_of(function), function, arguments, keywords)


def test_tensor_arguments_are_named() -> None:
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    calls = [
        running(F.linear, one, two, bias=three),
        running(torch.cat, [one, two]),
        running(torch.where, one, 2, three),
    ]
    assert [[(name, len(t)) for name, t in call.named_tensors()] for call in calls] == [
        [("input", 1), ("weight", 2), ("bias", 3)],
        [("input0", 1), ("input1", 2)],
        [("input", 1), ("arg2", 3)],
    ]


def test_inputs_are_as_they_were_when_first_asked() -> None:
    x = torch.ones(4)
    call = running(Tensor.mul_, x, 2.0)
    (before,) = call.inputs()
    x.mul_(2.0)
    assert call.inputs() == [before]
    assert before[1] is not None
    assert before[1].version == x._version - 1
    (sparse,) = running(torch.relu, torch.eye(2).to_sparse()).inputs()
    assert sparse[1] is None


@pytest.mark.parametrize(
    ("function", "keywords", "in_place"),
    [
        (Tensor.add_, {}, True),
        (F.relu, {"inplace": True}, True),
        (F.relu, {"inplace": False}, False),
        (torch.relu, {}, False),
    ],
)
def test_calls_in_place_are_known(function: Callable[..., Any], keywords: dict[str, Any], in_place: bool) -> None:
    assert running(function, torch.ones(1), **keywords).in_place is in_place


class Notes:
    """An observer."""

    operations = frozenset(["relu", "mul"])

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def after(self, call: Call, result: Any) -> None:
        self.calls.append(call)


def test_an_observer_is_told_of_its_operations_with_gradient() -> None:
    tracker, notes = OperationTracker(), Notes()
    tracker.observer = notes
    x = torch.ones(4, requires_grad=True)
    with tracker:
        y = torch.relu(x.exp()).mul_(2)
        with torch.no_grad():
            torch.relu(x)
    assert [call.operation.name for call in notes.calls] == ["relu", "mul"]
    geometry = notes.calls[1].inputs()[0][1]
    assert geometry is not None
    assert geometry.version == y._version - 1


def test_who_observes_is_asked_again_in_every_context() -> None:
    tracker, notes, x = OperationTracker(), Notes(), torch.ones(4, requires_grad=True)
    with tracker:
        torch.relu(x)
    tracker.observer = notes
    with tracker:
        torch.relu(x)
    tracker.replacements[torch.relu] = lambda function, arguments, keywords: function(*arguments) + 1
    with tracker:
        assert torch.equal(torch.relu(x), x + 1)
    assert [call.operation.name for call in notes.calls] == ["relu", "relu"]


def test_replacements_run_instead() -> None:
    tracker = OperationTracker()
    tracker.replacements[torch.relu] = lambda function, arguments, keywords: ("replaced", function, arguments, keywords)
    x = torch.ones(1)
    with tracker:
        assert torch.relu(x) == ("replaced", torch.relu, (x,), {})
