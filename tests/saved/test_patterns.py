"""Patterns of layers, classes and operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.saved.patterns import Patterns

CLASSES = {"": "Net", "encoder": "Encoder", "encoder.0": "Block", "encoder.0.norm": "LayerNorm", "head": "Linear"}


@pytest.mark.parametrize(
    ("pattern", "layer", "operation", "matches"),
    [
        ("encoder", "encoder.0.norm", "layer_norm", True),
        ("encoder.*", "encoder.0.norm", "layer_norm", True),
        ("encoder.0", "encoder.01", "layer_norm", False),
        ("*.norm", "encoder.0.norm", "layer_norm", True),
        ("head", "encoder.0.norm", "layer_norm", False),
        ("op:layer_*", "encoder.0.norm", "layer_norm", True),
        ("op:gelu", "encoder.0.norm", "layer_norm", False),
        ("type:LayerNorm", "encoder.0.norm", "layer_norm", True),
        ("type:Block", "encoder.0.norm", "layer_norm", True),
        ("type:Block", "head", "linear", False),
        ("type:Net", "head", "linear", True),
        ("*", "", "gelu", True),
    ],
)
def test_matches(pattern: str, layer: str, operation: str, matches: bool) -> None:
    patterns = Patterns({pattern: 8})
    patterns.name_classes(CLASSES)
    assert [patterns.find(layer, operation) for _ in range(2)] == [8 if matches else None] * 2


def test_the_last_match_wins() -> None:
    assert Patterns({"*": 2, "encoder": 4, "op:gelu": 8}).find("encoder.0", "linear") == 4
    assert Patterns({"*": 2, "encoder": 4, "op:gelu": 8}).find("encoder.0", "gelu") == 8


def test_other_classes_are_not_mistaken_for_the_old_ones() -> None:
    patterns = Patterns({"type:Linear": True})
    patterns.name_classes({"head": "Linear"})
    assert patterns.find("head", "linear")
    patterns.name_classes({"head": "Conv2d"})
    assert patterns.find("head", "linear") is None


class Net(nn.Module):
    """Two layers that save what they are given, each its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)))


def stored(**settings: object) -> dict[str, str]:
    engine = ActMemEngine(derive=False, **settings)
    model = Net()
    x = torch.randn(64, 64, requires_grad=True)
    with engine.compress(model):
        model(x * 1).sum().backward()
    rows = engine.ledger.sites.items()
    return {site.layer: row.codec for site, row in rows if site.role == "input" and row.kind != "weight"}


@pytest.mark.parametrize(
    ("settings", "codecs"),
    [
        ({}, {"first": "uniform-4", "second": "uniform-4", "norm": "uniform-4"}),
        ({"layer_bits": {"second": 8}}, {"first": "uniform-4", "second": "uniform-8", "norm": "uniform-4"}),
        ({"layer_bits": {"type:Linear": 2}}, {"first": "rotated-2", "second": "rotated-2", "norm": "uniform-4"}),
        (
            {"layer_bits": {"*": 32, "op:layer_norm": 3}},
            {"first": "exact", "second": "exact", "norm": "uniform-3"},
        ),
        ({"exact": ["type:Linear"]}, {"first": "exact", "second": "exact", "norm": "uniform-4"}),
        (
            {"exact": ["first"], "layer_bits": {"first": 2}},
            {"first": "exact", "second": "uniform-4", "norm": "uniform-4"},
        ),
    ],
    ids=["plain", "layer", "class", "operation", "exact class", "exact wins"],
)
def test_settings(settings: dict[str, object], codecs: dict[str, str]) -> None:
    assert stored(bits=4, **settings) == codecs
