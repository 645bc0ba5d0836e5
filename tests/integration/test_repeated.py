"""Which blocks of a model count as repeated, and that checkpointing them leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_actmem.integration.repeated import checkpointing, matching, repeated_blocks
from tests.models import MlpBlock, ResNet, bert, gpt2


class Experts(nn.Module):
    """A block that holds a list of smaller ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList(MlpBlock(4) for _ in range(4))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(MlpBlock(8), MlpBlock(8), nn.Linear(8, 1)), ["0", "1"]),
        (gpt2(), ["transformer.h.0", "transformer.h.1"]),
        (bert(), ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        (ResNet((2, 1), width=4), ["layers.0", "layers.1", "layers.2"]),
        (nn.ModuleDict({"blocks": nn.ModuleList(Experts() for _ in range(2))}), ["blocks.0", "blocks.1"]),
        (nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), []),
        (nn.Sequential(MlpBlock(8), nn.Linear(8, 8)), []),
        (nn.ModuleDict({"a": MlpBlock(8), "b": MlpBlock(8)}), []),
    ],
    ids=["mlp", "gpt2", "bert", "resnet", "nested", "layers", "one", "dict"],
)
def test_repeated_blocks(model, names):
    assert list(repeated_blocks(model)) == names


def test_checkpointing_keeps_gradients_and_leaves_nothing_behind():
    model = nn.Sequential(MlpBlock(8), MlpBlock(8))
    x = torch.randn(3, 8)
    gradients = []
    for blocks in ({}, repeated_blocks(model)):
        model.zero_grad()
        with checkpointing(blocks):
            assert sum("forward" in vars(module) for module in model.modules()) == len(blocks)
            model(x).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_block_within_a_block_is_checkpointed_too():
    model = nn.Sequential(nn.Sequential(MlpBlock(8)), nn.Linear(8, 8))
    names = list(matching(model, ["0*"]))
    assert names == ["0", "0.0", "0.0.norm", "0.0.up", "0.0.down"]
    with checkpointing(matching(model, ["0", "0.0"])):
        model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert model[0][0].up.weight.grad is not None


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="checkpointed must match submodules of the model, got \\['no'\\]"):
        matching(nn.Linear(1, 1), ["no"])
