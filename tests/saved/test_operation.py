"""What is known of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_actmem.saved import operation as ops
from lightning_actmem.saved.operation import bears_rounding, index_bound, operation_of


@pytest.mark.parametrize(
    ("operation", "arguments", "bears"),
    [
        ("linear", (), True),
        ("gelu", (), True),
        ("pow", (None, 2), True),
        ("pow", (None, 3.0), True),
        ("pow", (None, 0.5), False),
        ("pow", (None, 1.5), False),
        ("pow", (None, torch.ones(1)), False),
        ("pow", (None,), False),
        ("sqrt", (), False),
        ("softsign", (), False),
        ("sin", (), False),
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


@pytest.mark.parametrize(
    ("function", "in_place"),
    [
        (Tensor.add_, True),
        (Tensor.__iadd__, True),
        (Tensor.__add__, False),
        (torch.relu, False),
        (F.relu_, True),
    ],
)
def test_operations_in_place_are_known(function: Callable[..., Any], in_place: bool) -> None:
    assert operation_of(function).in_place is in_place


def test_questions_to_a_tensor_save_nothing() -> None:
    asked = [Tensor.shape.__get__, Tensor.dim, Tensor.size, Tensor.__len__]
    assert all(operation_of(function).saves_nothing for function in asked)
    assert not any(operation_of(function).saves_nothing for function in [torch.relu, Tensor.mul, F.linear])
