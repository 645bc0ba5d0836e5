"""Storages that stay alive anyway: found wherever a batch may keep its tensors."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from lightning_actmem.saved.borrowed import Borrowed, tensors_in

A, B = torch.ones(2), torch.zeros(3)


@dataclass
class Item:
    x: Tensor
    y: list[Tensor]


class Graph:
    """A batch class of a library's own (PyTorch Geometric keeps its tensors like this)."""

    def __init__(self) -> None:
        self._store = {"x": A, "edge_index": B}


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "batch",
    [
        (A, B),
        [A, [B]],
        {"x": A, "y": (B,)},
        OrderedDict(x=A, y=B),
        UserDict(x=A, y=B),
        Pair(A, B),
        Item(A, [B]),
        Graph(),
        ((A, "text", 3, None, nn.Linear(1, 1)), {"k": B}),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_tensors_in_a_batch(batch: Any) -> None:
    assert {id(tensor) for tensor in tensors_in(batch)} == {id(A), id(B)}


def test_a_batch_that_holds_itself_ends() -> None:
    batch: list[Any] = [A]
    batch.append(batch)
    assert A in list(tensors_in(batch))


def test_owners() -> None:
    model = nn.BatchNorm1d(4)
    sparse = torch.eye(2).to_sparse()
    borrowed = Borrowed(model, inputs=[A, sparse])
    owner = {
        name: borrowed.owner(t.untyped_storage()._cdata) for name, t in {"w": model.weight, "a": A, "b": B}.items()
    }
    assert owner == {"w": "weight", "a": "input", "b": None}
    assert model.running_mean is not None
    assert borrowed.owner(model.running_mean.untyped_storage()._cdata) == "buffer"
    assert borrowed.knows_inputs
    assert borrowed.owns(model.weight[:2])
    assert not borrowed.owns(A)
    assert not borrowed.owns(sparse)
    assert not Borrowed(model).knows_inputs


def test_a_batch_that_dies_within_the_step_does_not_lend_its_identity() -> None:
    batch = {"x": torch.randn(64, 64)}
    identity = batch["x"].untyped_storage()._cdata
    borrowed = Borrowed(None, batch)
    memory = ref(batch.pop("x"))
    assert memory() is None
    later = [torch.empty(64, 64) for _ in range(200)]
    assert all(tensor.untyped_storage()._cdata != identity for tensor in later)
    assert not any(borrowed.owner(tensor.untyped_storage()._cdata) for tensor in later)
