"""The attention benchmark: what it rounds, and that the exact log-sum-exp beside rounded keys is the worse choice."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import RoundedAttention, attention_loss, gradient, relative_error
from benchmarks.convergence import CharacterModel
from lightning_actmem_kernels import CodecSpec


@pytest.fixture
def model() -> CharacterModel:
    """A transformer with sharp scores."""
    torch.manual_seed(0)
    model = CharacterModel(16, width=32, depth=1).eval()
    with torch.no_grad():
        model.blocks[0].qkv.weight[:64] *= 12  # queries and keys
    return model


def test_consistent_storage_is_the_better_one(model: CharacterModel) -> None:
    batch = (torch.randint(16, (2, 96)), torch.randint(16, (2, 96)))
    look = RoundedAttention(None)
    exact = gradient(model, attention_loss(model, batch, look))
    assert look.largest_score > 10
    spec, keys = CodecSpec("rotated", 2), itertools.count()
    inconsistent, consistent = (
        relative_error(model, partial(attention_loss, model, batch, mode), exact, draws=3)
        for mode in (RoundedAttention(spec, False, keys), RoundedAttention(spec, True, keys))
    )
    assert 0 < consistent < 1
    assert not inconsistent < 10  # may overflow to NaN


def test_lossless_storage_has_no_error(model: CharacterModel) -> None:
    batch = (torch.randint(16, (2, 96)), torch.randint(16, (2, 96)))
    exact = gradient(model, model(*batch))
    mode = RoundedAttention(CodecSpec("identity"), True, itertools.count())
    assert torch.equal(gradient(model, attention_loss(model, batch, mode)), exact)


def test_the_program_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    attention.main(["--text", str(text), "--steps", "2", "--draws", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Largest score")
    assert len([line for line in lines if line.startswith(("| min-max", "| rotated"))]) == 4
