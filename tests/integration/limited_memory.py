"""A process with little memory: finds a batch size under an address-space limit, trains with it, and tells how it went.

Run as ``python -m tests.integration.limited_memory finder way``; prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_actmem import ActMem, ActMemBatchSizeFinder, ActMemStrategy
from lightning_actmem_kernels.reference import compiled
from tests.integration.support import hooks_active, new_trainer
from tests.models import MlpBlock

EXTRA_BYTES = 40 * 2**20
# Binsearch goes to the edge, to the last sample: a run has a little beside its trials, such as results for loggers.
SLACK_BYTES = 3 * 2**20
SAMPLES, TOKENS, WIDTH, BLOCKS, CLASSES = 4096, 16, 32, 12, 4
STEPS = 20
MAX_BATCH = 8192  # Lightning's own limit

WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "callback": lambda: {"callbacks": [ActMem(bits=4, summary=False)]},
    "strategy": lambda: {"strategy": ActMemStrategy(bits=4, summary=False)},
}


class ResidualMlp(LightningModule):
    """Little weight and much activation: one sample is small, so that batches differ by little."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.net = nn.Sequential(*(MlpBlock(WIDTH) for _ in range(BLOCKS)), nn.Linear(WIDTH, CLASSES))
        generator = torch.Generator().manual_seed(3)
        self.data = TensorDataset(
            torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator),
            torch.randint(CLASSES, (SAMPLES,), generator=generator),
        )
        self.sizes: list[int] = []
        self.compressed: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.sizes.append(len(x))
        self.compressed.append(hooks_active())
        return nn.functional.cross_entropy(self.net(x).mean(1), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size)


def trainer(way: str, *finders: Callback) -> Trainer:
    arguments = WAYS[way]()
    arguments["callbacks"] = [*arguments.get("callbacks", []), *finders]
    return new_trainer(**arguments, max_steps=STEPS, default_root_dir=sys.argv[3])


def limit_address_space(extra_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


class Slack(Callback):
    """Gives the run, but not the trials, which run without callbacks, a little more."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_AS, (limit + SLACK_BYTES, resource.RLIM_INFINITY))


def finder_of(name: str) -> Any:
    if name == "predict":
        return ActMemBatchSizeFinder()
    return BatchSizeFinder("binsearch", steps_per_trial=2, init_val=64, max_val=MAX_BATCH)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Lightning's finder does not take oneDNN's "could not create a primitive" for what it is.
    torch.backends.mkldnn.set_flags(False)
    compiled.AFTER_ELEMENTS = 1 << 62  # a compiler at work in this process would take more memory than the model
    finder, way = finder_of(sys.argv[1]), sys.argv[2]
    # Code that is loaded at its first use would count as memory of the model.
    trainer(way, ActMemBatchSizeFinder("1GiB", max_batch_size=64)).fit(ResidualMlp())
    model = ResidualMlp()
    limit_address_space(EXTRA_BYTES)
    run = trainer(way, finder, Slack())
    run.fit(model)
    told = {
        "batch": model.batch_size,
        "steps": run.global_step,
        "largest_of_last_steps": max(model.sizes[-STEPS:]),
        "compressed": all(model.compressed),
        "sizes": sorted(set(model.sizes)),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
