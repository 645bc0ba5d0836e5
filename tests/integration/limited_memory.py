"""A process with little memory: finds a batch size under an address-space limit, trains with it, and tells how it went.

Run as ``python -m tests.integration.limited_memory finder way folder model steps``; prints one line of JSON.
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
from lightning_actmem.memory import collect
from lightning_actmem_kernels.reference import compiled
from tests.integration.support import hooks_active, new_trainer
from tests.models import MlpBlock, ResNet

EXTRA_BYTES = 120 * 2**20
# Binsearch ends 5 % below the edge; what a process grows by in a run is as much of the little memory here.
SLACK_BYTES = 3 * 2**20
# No power of two: Lightning's binsearch never ends where one that it tries is the number of samples.
SAMPLES, CLASSES = 3000, 4
MAX_BATCH = 8192  # Lightning's own limit

WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "callback": lambda: {"callbacks": [ActMem(bits=4, summary=False)]},
    "strategy": lambda: {"strategy": ActMemStrategy(bits=4, summary=False)},
}


class Limited(LightningModule):
    """Little weight and much activation: one sample is small, so that batches differ by little."""

    def __init__(self, inputs: Tensor, net: nn.Module) -> None:
        super().__init__()
        self.batch_size = 64
        self.net = net
        self.data = TensorDataset(inputs, torch.randint(CLASSES, (len(inputs),)))
        self.sizes: list[int] = []
        self.compressed: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.sizes.append(len(x))
        self.compressed.append(hooks_active())
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size)


class Mean(nn.Module):
    """The mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Attention(nn.Module):
    """Residual self-attention with the norm before it."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.project(attended.transpose(1, 2).flatten(2))


def residual_mlp() -> Limited:
    width = 32
    blocks = (MlpBlock(width) for _ in range(12))
    return Limited(torch.randn(SAMPLES, 32, width), nn.Sequential(*blocks, nn.Linear(width, CLASSES), Mean()))


def transformer(causal: bool, inputs: Tensor, embed: nn.Module) -> Limited:
    width = 32
    blocks = [part for _ in range(4) for part in (Attention(width, 4, causal), MlpBlock(width))]
    return Limited(inputs, nn.Sequential(embed, *blocks, nn.LayerNorm(width), nn.Linear(width, CLASSES), Mean()))


def gpt() -> Limited:
    return transformer(True, torch.randint(64, (SAMPLES, 32)), nn.Embedding(64, 32))


def vit() -> Limited:
    """Patches of 4 x 4 pixels, taken apart beforehand."""
    return transformer(False, torch.randn(2 * SAMPLES, 16, 48), nn.Sequential(nn.Linear(48, 32), nn.Dropout(0.1)))


def resnet() -> Limited:
    return Limited(torch.randn(SAMPLES, 3, 32, 32), ResNet((1, 1, 1, 1), width=8, classes=CLASSES))


MODELS: dict[str, Callable[[], Limited]] = {"mlp": residual_mlp, "gpt": gpt, "vit": vit, "resnet": resnet}


def trainer(way: str, *finders: Callback) -> Trainer:
    arguments = WAYS[way]()
    arguments["callbacks"] = [*arguments.get("callbacks", []), *finders]
    return new_trainer(**arguments, max_steps=int(sys.argv[5]), default_root_dir=sys.argv[3])


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def used_up_heap() -> list[Tensor]:
    """Take the free blocks of the heap, which imports and a first run have left: no limit is about them."""
    taken = []
    for size in (1 << power for power in range(24, 11, -1)):
        while True:
            before = address_space()
            block = torch.empty(size, dtype=torch.uint8)
            if address_space() > before:
                break
            taken.append(block)
    return taken


def limit_address_space(extra_bytes: int) -> None:
    limit = address_space() + extra_bytes
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
    torch.manual_seed(0)
    # Lightning's finder does not take oneDNN's "could not create a primitive" for what it is.
    torch.backends.mkldnn.set_flags(False)
    compiled.AFTER_ELEMENTS = 1 << 62  # a compiler at work in this process would take more memory than the model
    finder, way, build = finder_of(sys.argv[1]), sys.argv[2], MODELS[sys.argv[4]]
    # Code that is loaded at its first use would count as memory of the model.
    trainer(way, ActMemBatchSizeFinder("1GiB", max_batch_size=64)).fit(build())
    model = build()
    collect()
    heap = used_up_heap()
    limit_address_space(EXTRA_BYTES)
    run = trainer(way, finder, *([Slack()] if isinstance(finder, BatchSizeFinder) else []))
    run.fit(model)
    told = {
        "batch": model.batch_size,
        "steps": run.global_step,
        "largest_of_last_steps": max(model.sizes[-run.global_step :]),
        "compressed": all(model.compressed),
        "sizes": sorted(set(model.sizes)),
        "trials": len(finder.search.trials) if isinstance(finder, ActMemBatchSizeFinder) else None,
        "did": finder.search.explain() if isinstance(finder, ActMemBatchSizeFinder) else None,
        "heap_bytes": sum(block.nbytes for block in heap),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
