"""Trains a small character-level transformer plain and packed, with several seeds, and compares the final losses.

Run ``python -m benchmarks.convergence --text FILE``; each run appends a row to ``convergence.csv``. A seed fixes
weights, order of the data and dropout, so that runs of one seed differ by the rounding alone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import environment
from lightning_actmem import ActMemEngine

CONTEXT = 96
BATCH = 16
LEARNING_RATE = 2e-3
VALIDATION_SHARE = 0.05
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "4 bits": {"bits": 4},
    "2 bits": {"bits": 2},
    "1 bit": {"bits": 1},
    "2 bits, min-max groups": {"bits": 2, "codec": "uniform"},
    "2 bits, min-max groups, stochastic rounding": {"bits": 2, "codec": "uniform", "rounding": "stochastic"},
}


class Block(nn.Module):
    """A pre-norm decoder block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class CharacterModel(nn.Module):
    """A decoder-only transformer over characters."""

    def __init__(self, characters: int, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.embedding(ids) + self.position)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def encode(text: str) -> tuple[Tensor, int]:
    """Return the text as numbers, and how many different characters it has."""
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def windows(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Cut inputs and their next characters at these places."""
    rows = torch.stack([ids[start : start + CONTEXT + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def run(ids: Tensor, characters: int, seed: int, steps: int, config: dict[str, Any] | None) -> tuple[float, float]:
    """Train once and return the validation loss and the last step's ratio of activation bytes."""
    split = int(len(ids) * (1 - VALIDATION_SHARE))
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = CharacterModel(characters)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    engine = None if config is None else ActMemEngine(config, seed=seed)
    for _ in range(steps):
        batch = windows(ids, torch.randint(split - CONTEXT - 1, (BATCH,), generator=order))
        with contextlib.nullcontext() if engine is None else engine.compress(model, inputs=batch):
            loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        starts = torch.arange(split, len(ids) - CONTEXT - 1, CONTEXT)
        losses = [model(*windows(ids, part)).item() for part in starts.split(64)]
    return statistics.fmean(losses), 1.0 if engine is None else engine.report().ratio


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the CSV, which begins with the names of the columns."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Run every configuration with every seed and print the losses and their gaps to plain training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("convergence.csv"))
    options = parser.parse_args()
    ids, characters = encode(options.text.read_text())
    for seed in options.seeds:
        for name in options.only:
            start = time.perf_counter()
            loss, ratio = run(ids, characters, seed, options.steps, CONFIGURATIONS[name])
            row = {"text": options.text.stem, "steps": options.steps, "seed": seed, "configuration": name}
            row |= {"val_loss": round(loss, 5), "ratio": round(ratio, 2), "seconds": round(time.perf_counter() - start)}
            append(options.csv, {**environment(torch.device("cpu")), **row})
            print(row, flush=True)


if __name__ == "__main__":
    main()
