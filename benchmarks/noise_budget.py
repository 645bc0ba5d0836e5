"""Trains with ``noise=0.05`` and plainly, and follows the noise, the bytes and the loss through the runs.

Run ``python -m benchmarks.noise_budget --text FILE --cifar FOLDER``, with either or both: a character transformer on a
text, and a ResNet with batch norm on CIFAR-10. Every run appends rows to ``noise_budget.csv``. A seed fixes weights,
order of the data and dropout, so that runs of one seed differ by the rounding alone.

``noise`` is measured beside the training and apart from the adaptation's own passes, every ``--every`` steps under the
plan of that moment, on whole batches that are not trained on: the mean of ``|g' - g|^2`` over the mean of
``|g_i - g_j|^2 / 2`` for pairs of batches, all with the dropout of training. ``own_noise`` and ``predicted_noise`` are
what the last adaptation or check has measured and predicted, on parts of its batch.
"""

from __future__ import annotations

import argparse
import itertools
import pickle
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset

from benchmarks.convergence import BATCH, CONTEXT, VALIDATION_SHARE, CharacterModel, append, encode, windows
from benchmarks.models import BasicBlock
from benchmarks.results import environment
from lightning_actmem import ActMem, ActMemEngine

NOISE = 0.05
LEARNING_RATE = 2e-3
IMAGES_BATCH = 64
CLASSES = 10
VALIDATION_IMAGES = 2000
MEASURED_BATCHES = 4
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
Batch = tuple[Tensor, Tensor]
Row = dict[str, Any]


class Work(NamedTuple):
    """What is trained on what.

    Args:
        build: Returns the model, whose forward returns the loss of a batch.
        draw: Returns a training batch, drawn by a generator.
        validation: The batches of the final loss.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    validation: list[Batch]


class Classifier(nn.Module):
    """A ResNet of three stages for 32 x 32 pixels (He et al., 2016, section 4.2), one block each, with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            BasicBlock(16, 16, 1),
            BasicBlock(16, 32, 2),
            BasicBlock(32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(images), labels)


class Batches(Dataset[Batch]):
    """Training batches, the same for each seed."""

    def __init__(self, work: Work, seed: int, steps: int) -> None:
        self.work, self.seed, self.steps = work, seed, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        return self.work.draw(torch.Generator().manual_seed(self.seed * 1_000_000 + index))


class Task(LightningModule):
    """A model that returns its loss, trained by AdamW for a number of steps."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(*batch)

    def configure_optimizers(self) -> Any:
        optimizer = optim.AdamW(self.parameters(), LEARNING_RATE)
        schedule = optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Follow(Callback):
    """Measures the noise every so many steps.

    Args:
        actmem: What trains.
        batches: What is measured on.
        every: Steps between two measurements.
        emit: Takes the row of each.
    """

    def __init__(self, actmem: ActMem, batches: list[Batch], every: int, emit: Callable[[Row], None]) -> None:
        self.actmem, self.batches, self.every, self.emit = actmem, batches, every, emit

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        report = self.actmem.engine.report(table=False)
        last = self.actmem.adaptation.history[-1]
        self.emit(
            {
                "step": trainer.global_step,
                "noise": f"{self.noise(pl_module):.5f}",
                "own_noise": f"{last.noise:.5f}",
                "predicted_noise": f"{last.predicted_noise:.5f}",
                "stored_bytes": report.saved_bytes,
                "ratio": f"{report.ratio:.3f}",
            }
        )

    def noise(self, module: LightningModule) -> float:
        """Return the noise under the plan of now; nothing of the training changes."""
        engine = ActMemEngine(self.actmem.engine.config, seed=1 + self.actmem.engine.step)
        engine.plan = self.actmem.engine.plan
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        exact: list[Tensor] = []
        errors: list[Tensor] = []
        with torch.random.fork_rng():
            for seed, batch in enumerate(self.batches):
                torch.manual_seed(seed)
                exact.append(_gradient(module, module.model(*batch)))
                torch.manual_seed(seed)
                with engine.compress(module, inputs=batch):
                    loss = module.model(*batch)
                errors.append((_gradient(module, loss) - exact[-1]).square().sum())
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        own = [(a - b).square().sum() / 2 for a, b in itertools.combinations(exact, 2)]
        return float(torch.stack(errors).mean() / torch.stack(own).mean())


def _gradient(module: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(module.parameters()))])


def text(path: Path) -> Work:
    """A character transformer with dropout on a text."""
    ids, characters = encode(path.read_text())
    split = int(len(ids) * (1 - VALIDATION_SHARE))

    def draw(generator: torch.Generator) -> Batch:
        return windows(ids, torch.randint(split - CONTEXT - 1, (BATCH,), generator=generator))

    starts = torch.arange(split, len(ids) - CONTEXT - 1, CONTEXT)
    return Work(lambda: CharacterModel(characters), draw, [windows(ids, part) for part in starts.split(64)])


def cifar(folder: Path) -> Work:
    """A ResNet on the first of CIFAR-10's five files of training images, mirrored at random."""
    images, labels = _images(folder / "data_batch_1")
    test_images, test_labels = (part[:VALIDATION_IMAGES] for part in _images(folder / "test_batch"))

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(images), (IMAGES_BATCH,), generator=generator)
        mirrored = torch.rand(IMAGES_BATCH, 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirrored, images[chosen].flip(-1), images[chosen]), labels[chosen]

    return Work(Classifier, draw, list(zip(test_images.split(500), test_labels.split(500), strict=True)))


def _images(path: Path) -> Batch:
    """Return the images of a file of CIFAR-10's Python version, with mean 0 and deviation 1, and their labels."""
    with path.open("rb") as file:
        found = pickle.load(file, encoding="bytes")
    pixels = torch.as_tensor(found[b"data"]).view(-1, 3, 32, 32).float()
    return (pixels - pixels.mean()) / pixels.std(), torch.tensor(found[b"labels"])


def run(work: Work, seed: int, options: argparse.Namespace, noise: float | None, emit: Callable[[Row], None]) -> float:
    """Train once, hand out a row for every measurement of the noise, and return the final validation loss."""
    seed_everything(seed, verbose=False)
    steps = options.steps
    module = Task(work.build(), steps)
    callbacks: list[Callback] = []
    if noise is not None:
        actmem = ActMem(noise=noise, adapt_every=_adapt_every(options), seed=seed, summary=False)
        unseen = Batches(work, seed + 1000, MEASURED_BATCHES)
        callbacks = [actmem, Follow(actmem, [unseen[index] for index in range(MEASURED_BATCHES)], options.every, emit)]
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=callbacks,
    )
    trainer.fit(module, DataLoader(Batches(work, seed, steps), batch_size=None))
    module.eval()
    with torch.no_grad():
        return statistics.fmean(module.model(*batch).item() for batch in work.validation)


def _adapt_every(options: argparse.Namespace) -> int:
    return 2 * options.every if options.adapt_every is None else int(options.adapt_every)


def record(name: str, work: Work, options: argparse.Namespace) -> None:
    """Run one task with every seed, plainly and with a noise budget; append and print what comes of it."""
    for seed in options.seeds:
        for noise in (None, NOISE):
            head = {**environment(torch.device("cpu")), "data": name, "steps": options.steps, "seed": seed}
            rhythm = "" if options.adapt_every is None else f", adapt_every={options.adapt_every}"
            head["configuration"] = "plain" if noise is None else f"noise={noise}{rhythm}"
            rows: list[Row] = []

            def emit(row: Row, head: Row = head, rows: list[Row] = rows) -> None:
                rows.append(row)
                append(options.csv, {**head, "val_loss": "", **row})

            loss = run(work, seed, options, noise, emit)
            empty = dict.fromkeys(("noise", "own_noise", "predicted_noise", "stored_bytes", "ratio"), "")
            append(options.csv, {**head, "val_loss": f"{loss:.5f}", "step": options.steps, **empty})
            noises = [float(row["noise"]) for row in rows]
            ratios = [float(row["ratio"]) for row in rows]
            found = f", noise at most {max(noises):.4f}, mean {statistics.fmean(noises):.4f}" if noises else ""
            found += f", stored {statistics.fmean(ratios):.1f} times less" if noises else ""
            print(f"{name}, seed {seed}, {head['configuration']}: loss {loss:.4f}{found}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run what there is data for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help=f"a text file, such as {TEXT_URL}")
    parser.add_argument("--cifar", type=Path, help=f"the folder cifar-10-batches-py of {CIFAR_URL}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="steps from one measurement to the next")
    parser.add_argument("--adapt-every", type=int, help="as the setting; by default at every second measurement")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("noise_budget.csv"))
    options = parser.parse_args(arguments)
    if options.text is None and options.cifar is None:
        parser.error(f"give --text FILE ({TEXT_URL}), --cifar FOLDER (cifar-10-batches-py of {CIFAR_URL}), or both.")
    if options.cifar is not None and not (options.cifar / "data_batch_1").is_file():
        parser.error(f"--cifar must be a folder with data_batch_1 and test_batch, got {options.cifar}. See {CIFAR_URL}")
    if options.text is not None:
        record(options.text.stem, text(options.text), options)
    if options.cifar is not None:
        record("CIFAR-10", cifar(options.cifar), options)


if __name__ == "__main__":
    main()
