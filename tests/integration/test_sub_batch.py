"""Sub-batches: disjoint parts of every kind of batch that Lightning passes on, or the reason why there are none."""

from __future__ import annotations

import re
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from lightning_actmem.integration.sub_batch import cut

SAMPLES = 16
X = torch.arange(SAMPLES * 3.0).reshape(SAMPLES, 3)
Y = torch.arange(SAMPLES)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    name: str = "kept"
    y: Tensor = field(default_factory=lambda: Y)


class Encoding(UserDict):  # type: ignore[type-arg]
    """As Hugging Face's BatchEncoding: a mapping that is no dict, with something of its own beside the items."""

    def __init__(self, data: Any, kind: str = "") -> None:
        super().__init__(data)
        self.kind = kind


class Graphs:
    """As PyTorch Geometric's batch: many graphs in one."""

    def __init__(self, graphs: list[Tensor]) -> None:
        self.nodes = torch.cat(graphs)
        self.graphs = graphs

    @property
    def num_graphs(self) -> int:
        return len(self.graphs)

    def to_data_list(self) -> list[Tensor]:
        return self.graphs

    @classmethod
    def from_data_list(cls, graphs: list[Tensor]) -> Graphs:
        return cls(graphs)


def parts(batch: Any) -> tuple[Any, Any]:
    found = cut(batch, count=2, share=4)
    assert found.reason == ""
    assert found.samples == 4
    first, second = found.parts
    return first, second


def assert_rows(found: Tensor, whole: Tensor, start: int) -> None:
    torch.testing.assert_close(found, whole[start : start + 4], rtol=0, atol=0)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        Pair(X, Y),
        OrderedDict(x=X, y=Y),
        defaultdict(list, x=X, y=Y),
        MappingProxyType({"x": X, "y": Y}),
        Encoding({"x": X, "y": Y}, kind="kept"),
        Frozen(X),
        {"x": {"deep": [X]}, "y": (Y,)},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_tensors_in_any_nesting(batch):
    def leaves(part: Any) -> list[Tensor]:
        if isinstance(part, Tensor):
            return [part]
        values = part.values() if hasattr(part, "values") else vars(part).values() if isinstance(part, Frozen) else part
        return [leaf for value in values if not isinstance(value, str) for leaf in leaves(value)]

    for start, part in zip((0, 4), parts(batch), strict=True):
        assert type(part) is type(batch)
        x, y = sorted(leaves(part), key=lambda leaf: -leaf.ndim)
        assert_rows(x, X, start)
        assert_rows(y, Y, start)
    first = parts(batch)[0]
    assert getattr(first, "name", "kept") == getattr(first, "kind", "kept") == "kept"


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": X, "labels": Y})
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=X)
    for batch, name in ((encoding, "input_ids"), (output, "last_hidden_state")):
        for start, part in zip((0, 4), parts(batch), strict=True):
            assert type(part) is type(batch)
            assert_rows(part[name], X, start)
        assert len(batch[name]) == SAMPLES


def test_what_belongs_to_no_sample_goes_with_every_part():
    positions, scale, captions = torch.arange(5)[None], torch.tensor(2.0), [f"caption {i}" for i in range(SAMPLES)]
    for start, part in zip((0, 4), parts((X, positions, scale, captions, "train", None)), strict=True):
        assert_rows(part[0], X, start)
        assert torch.equal(part[1], positions)
        assert torch.equal(part[2], scale)
        assert part[3] == captions[start : start + 4]
        assert part[4:] == ("train", None)


def test_a_bare_tensor():
    for start, part in zip((0, 4), parts(X), strict=True):
        assert_rows(part, X, start)


def test_packed_sequences_are_cut_by_sequence():
    sequences = [torch.randn(1 + i % 5, 2) for i in range(SAMPLES)]
    for start, (packed, y) in zip((0, 4), parts((pack_sequence(sequences, enforce_sorted=False), Y)), strict=True):
        assert isinstance(packed, PackedSequence)
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        assert_rows(y, Y, start)
        for row, length, wanted in zip(padded, lengths, sequences[start : start + 4], strict=True):
            torch.testing.assert_close(row[:length], wanted, rtol=0, atol=0)


def test_graphs_are_cut_by_graph():
    graphs = [torch.full((1 + i % 3,), float(i)) for i in range(SAMPLES)]
    for start, part in zip((0, 4), parts(Graphs(graphs)), strict=True):
        assert part.graphs == graphs[start : start + 4]


def test_columns_of_samples_of_different_sizes():
    """Detection: images and targets of every size, ``tuple(zip(*samples))``."""
    images = tuple(torch.randn(3, 4 + i, 5) for i in range(SAMPLES))
    targets = tuple({"boxes": torch.randn(i, 4)} for i in range(SAMPLES))
    for start, part in zip((0, 4), parts((images, targets)), strict=True):
        found, boxes = part
        assert all(map(torch.equal, found, images[start : start + 4]))
        assert [target["boxes"].shape[0] for target in boxes] == list(range(start, start + 4))


def columns() -> tuple[Any, ...]:
    return tuple(torch.ones(2, 2 + i) for i in range(SAMPLES)), tuple(torch.ones(i + 1) for i in range(SAMPLES))


@pytest.mark.parametrize(
    "batch", [{"x": torch.ones(SAMPLES, 2), "shared": torch.ones(1, 2)}, columns()], ids=["dict", "columns"]
)
def test_a_part_changed_in_place_leaves_the_batch_alone(batch):
    for part in parts(batch):
        values = part.values() if isinstance(part, dict) else [value for column in part for value in column]
        for value in values:
            assert (value == 1).all()
            value.mul_(2)
    whole = batch.values() if isinstance(batch, dict) else [value for column in batch for value in column]
    assert all((value == 1).all() for value in whole)


@given(total=st.integers(0, 70), count=st.integers(1, 4), share=st.integers(1, 16), least=st.integers(1, 3))
def test_parts_are_disjoint_and_of_equal_size(total, count, share, least):
    found = cut(torch.arange(total), count=count, share=share, least=least)
    if total <= 1 or total < count:
        assert found.parts == ()
        assert found.reason
        return
    taken = [row for part in found.parts for row in part.tolist()]
    assert len(found.parts) == count
    assert all(len(part) == found.samples for part in found.parts)
    assert taken == list(range(count * found.samples))
    assert found.samples <= max(total // share, least)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ((X, torch.ones(3)), r"different sizes in their first dimension \(3, 16\)"),
        ([], "no tensor with more than one sample"),
        ("text", "no tensor with more than one sample"),
        (torch.ones(1, 4), "no tensor with more than one sample"),
        ([(X, {"y": torch.ones(3)}), (X, {"y": torch.ones(2)})], "different sizes"),
    ],
)
def test_what_cannot_be_cut_says_why(batch, reason):
    found = cut(batch, count=2, share=8)
    assert found.parts == ()
    assert found.samples == 0
    assert re.search(reason, found.reason)


def test_a_batch_that_cannot_be_rebuilt_says_why():
    class Strict(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: str, value: Any) -> None:
            raise ValueError("read only")

    found = cut(Strict(x=X), count=2, share=8)
    assert found.reason == "a part of a Strict could not be built (read only)"
