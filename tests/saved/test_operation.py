"""The operation tracker: names, arguments, and operations hidden in others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem.saved import operation as ops
from lightning_actmem.saved.operation import OperationTracker, bears_rounding, index_bound


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
    assert tracker.function is None
    assert tracker.arguments == ()


def test_tensor_arguments_are_named() -> None:
    tracker = OperationTracker()
    tracker.function, tracker.arguments, tracker.keywords = (
        F.linear,
        (torch.ones(1), torch.ones(2)),
        {"bias": torch.ones(3)},
    )
    assert [(name, len(t)) for name, t in tracker.tensor_arguments()] == [("input", 1), ("weight", 2), ("bias", 3)]
    tracker.function, tracker.arguments, tracker.keywords = torch.cat, ([torch.ones(1), torch.ones(2)],), {}
    assert [(name, len(t)) for name, t in tracker.tensor_arguments()] == [("input0", 1), ("input1", 2)]


@pytest.mark.parametrize(
    ("operation", "arguments", "bears"),
    [
        ("linear", (), True),
        ("gelu", (), True),
        ("pow", (None, 2), True),
        ("pow", (None, 0.5), False),
        ("pow", (None, torch.ones(1)), False),
        ("pow", (None,), False),
        ("sqrt", (), False),
        ("div", (), False),
        ("a_custom_kernel", (), False),
        ("", (), False),
    ],
)
def test_only_known_operations_bear_rounding(operation: str, arguments: tuple[Any, ...], bears: bool) -> None:
    assert bears_rounding(operation, arguments) is bears


def test_no_operation_is_both_packable_and_exact() -> None:
    assert not ops.PACKABLE & (ops.ATTENTION | ops.LOSS | ops.FILLED_LATER | ops.POSITIONS)


@pytest.mark.parametrize(
    ("operation", "shape", "bound"),
    [
        ("max_pool1d", (2, 3, 7), 7),
        ("max_pool2d", (2, 3, 7, 5), 35),
        ("adaptive_max_pool3d", (3, 2, 3, 4), 24),
        ("topk", (300, 2), 300),
        ("max", (), 1),
        ("avg_pool2d", (2, 3, 7, 5), None),
        ("embedding", (10,), None),
    ],
)
def test_index_bounds(operation: str, shape: tuple[int, ...], bound: int | None) -> None:
    assert index_bound(operation, torch.empty(shape)) == bound
