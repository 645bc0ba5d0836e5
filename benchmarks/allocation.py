"""Prints what measured bits gain over uniform ones, as a table in Markdown.

Run ``python -m benchmarks.allocation --text FILE`` (any text; without it the GPT learns rising sequences). A small GPT
and a small ResNet are trained plainly for some steps first. Every row packs the same fresh batch: the bytes stored,
and ``E|g' - g|^2`` over ``|g|^2``, of training steps, and as the sum over the sites, each rounded by itself in replays
of that batch. Nothing has a floor, so that "2 bits" is 2 bits; what the loss stores is exact unless the row says
otherwise. Adaptive rows measure on quarters of other batches, 32 backward passes at a time (GACT as many as it needs),
and then allocate 2 bits for every element that is stored, the bytes of uniform 2 bits (which take 1 bit where a ReLU's
sign helps), or 2 bits for every element that plain autograd would keep.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.convergence import BATCH, CONTEXT, CharacterModel, encode, windows
from benchmarks.gradient_error import Batch, Task, gpt, gradient, resnet
from lightning_actmem import ActMemEngine
from lightning_actmem.adapt.replay import ExactGradient

PARTS = 4
# Fewer have no part in a good choice: logarithms of probabilities err too much.
LOSS_BITS = 4
UNIFORM: dict[str, dict[str, Any]] = {
    "uniform 2 bits": {"bits": 2},
    "uniform 2 bits, dither": {"bits": 2, "codec": "uniform"},
    "uniform 2 bits, min-max SR": {"bits": 2, "codec": "uniform", "rounding": "stochastic"},
    "uniform 4 bits, min-max SR": {"bits": 4, "codec": "uniform", "rounding": "stochastic"},
}
# By the published laws queries and keys would get 1 bit, and ruin the rest.
PUBLISHED: dict[str, dict[str, Any]] = {
    "actnn": {"method": "actnn", "attention_bits": 2},
    "gact": {"method": "gact", "attention_bits": 2},
}


def text_model(path: Path) -> Task:
    """A character transformer on a text."""
    ids, characters = encode(path.read_text())
    model = CharacterModel(characters).eval()
    return (
        model,
        lambda: windows(ids, torch.randint(len(ids) - CONTEXT - 1, (BATCH,))),
        lambda batch: model(*batch),
    )


def error(task: Task, batch: Batch, exact: Tensor, engine: ActMemEngine, draws: int) -> float:
    """Return the mean squared error of the gradient, relative to its square."""
    errors = [(gradient(task, batch, engine) - exact).square().sum() for _ in range(draws)]
    return float(sum(errors) / draws / exact.square().sum())


def measure(task: Task, engine: ActMemEngine) -> None:
    """Run one adaptation's passes on two quarters of a new batch."""
    model, new_batch, loss_of = task
    batch = new_batch()
    count = len(batch[0]) // PARTS
    parts = [(batch[0][start : start + count], batch[1][start : start + count]) for start in (0, count)]
    assert engine.adapter is not None
    engine.adapter.measure(model, [partial(loss_of, part) for part in parts], inputs=parts)


def adapted(task: Task, batch: Batch, adaptations: int, config: dict[str, Any]) -> ActMemEngine:
    """Return an engine that has seen a training step, and then several times measured and allocated, as in a run."""
    engine = ActMemEngine(bits=2, min_elements=0, **config)
    assert engine.adapter is not None
    for _ in range(adaptations):
        gradient(task, batch, engine)
        measure(task, engine)
        engine.adapter.allocate()
    return engine


def predicted(task: Task, batch: Batch, exact: Tensor, engine: ActMemEngine, draws: int) -> float:
    """Return the sum over the sites of what each one's rounding adds by itself, relative to the gradient's square."""
    model, _, loss_of = task
    replay = engine.probe(lambda: loss_of(batch), model, inputs=batch)
    gradients = ExactGradient(list(model.parameters()))
    gradients.take(replay)
    plan = {site: engine.plan.get(site, use.default) for site, use in replay.uses.items()}
    parts = [gradients.error(replay, {site: spec}) for site, spec in plan.items() if spec for _ in range(draws)]
    return float(sum(parts) / draws / exact.square().sum())


def show(name: str, task: Task, batch: Batch, exact: Tensor, engine: ActMemEngine, draws: int) -> None:
    """Print a row."""
    variance = error(task, batch, exact, engine, draws)
    report = engine.report()
    stored = f"{report.stored_bytes:,} | {report.bits_per_element:.2f}"
    total = predicted(task, batch, exact, engine, max(draws // 3, 1))
    print(f"| {name} | {stored} | {variance:.2e} | {total:.2e} |", flush=True)


def table(name: str, task: Task, options: argparse.Namespace) -> None:
    """Print a model's table."""
    batch = task[1]()
    exact = gradient(task, batch, None)
    print(f"\n| {name} | stored bytes | bits per activation | variance | sum over sites |")
    print("|---|---|---|---|---|")
    stored_bytes: list[int] = []
    for label, config in UNIFORM.items():
        engine = ActMemEngine(config, attention_bits=config["bits"], min_elements=0)
        show(label, task, batch, exact, engine, options.draws)
        stored_bytes.append(engine.report().stored_bytes)
    report = engine.report()
    own = {"adapt": True, "attention_bits": 1}
    measured = {
        "actmem, 2 bits per stored element": own,
        "actmem, bytes of uniform 2 bits, loss at 4 bits or more": {
            **own,
            "loss_bits": LOSS_BITS,
            "budget": str(stored_bytes[0]),
        },
        "actmem, 2 bits per activation, loss at 4 bits or more": {
            **own,
            "loss_bits": LOSS_BITS,
            "budget": str(report.elements // 4),
        },
    }
    for label, config in {**PUBLISHED, **measured}.items():
        engine = adapted(task, batch, 1 if "method" in config else options.adaptations, config)
        show(label, task, batch, exact, engine, options.draws)


def main() -> None:
    """Train, measure, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="a text file for the GPT")
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=150, help="training steps before measuring")
    parser.add_argument("--adaptations", type=int, default=4)
    parser.add_argument("--only", choices=["GPT", "ResNet"])
    options = parser.parse_args()
    builds: dict[str, Callable[[], Task]] = {
        "GPT": gpt if options.text is None else lambda: text_model(options.text),
        "ResNet": resnet,
    }
    for name, build in builds.items():
        if options.only not in (None, name):
            continue
        torch.manual_seed(0)
        task = model, new_batch, loss_of = build()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(options.warmup):
            optimizer.zero_grad()
            loss_of(new_batch()).backward()
            optimizer.step()
        table(name, task, options)


if __name__ == "__main__":
    main()
