"""Bits that adapt under DDP: all ranks take the same plan, and none waits for one that cannot measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_actmem import ActMem, ActMemDDPStrategy
from lightning_actmem.adapt.adapter import Adapter
from lightning_actmem.integration import adaptation
from tests.integration.support import PACK_ALL, Net, assert_bit_equal, fit, weights

PROCESSES = 2
SAMPLES = 16
NOISE = 0.05

pytestmark = [
    pytest.mark.slow,
    pytest.mark.own_process,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed"),
    pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is"),
]


class TellingNet(Net):
    """Writes down what each process has found and done."""

    def __init__(self, folder: Path) -> None:
        super().__init__(batch_size=SAMPLES, samples=4 * SAMPLES * PROCESSES)
        self.folder = folder

    def on_train_end(self) -> None:
        (actmem,) = (callback for callback in self.trainer.callbacks if isinstance(callback, ActMem))
        plan = {str(site): str(spec) for site, spec in actmem.engine.plan.items()}
        state = actmem.state_dict()
        sums = [weight.double().sum().item() for weight in weights(self).values()]
        told = {
            "plan": plan,
            "history": state["adaptation"]["history"],
            "sensitivities": state.get("adapter", {}).get("sensitivities"),
            "weights": sums,
        }
        Path(self.folder, f"rank{self.global_rank}.json").write_text(json.dumps(told))

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(Path(self.folder, f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


class BranchingNet(TellingNet):
    """Runs a layer more on rank zero than elsewhere, and lets its two ranks save tensors of different sizes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        if self.global_rank == 0:
            return nn.functional.silu(scores * 2) + 0 * self.second(scores).sum()
        return scores + 0 * self.second(scores.detach()).sum()


class FailingNet(TellingNet):
    """Cannot run a part of a batch on one rank."""

    def forward(self, x: Tensor) -> Tensor:
        if self.global_rank == 1 and len(x) < SAMPLES:
            raise RuntimeError("not this part")
        return super().forward(x)


class StubbornNet(TellingNet):
    """Gets batches on one rank that cannot be cut."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch if self.global_rank == 0 else [*batch, torch.zeros(3)]

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch[:2])


def train(net: type[TellingNet], folder: Path, strategy: Any = None, **settings: Any) -> TellingNet:
    torch.manual_seed(0)
    model = net(folder)
    strategy = strategy or ActMemDDPStrategy(**settings, **PACK_ALL, start_method="fork")
    callbacks = [ActMem(**settings, **PACK_ALL)] if type(strategy) is DDPStrategy else []
    fit(model, strategy=strategy, devices=PROCESSES, max_steps=-1, max_epochs=4, callbacks=callbacks)
    return model


@pytest.mark.parametrize("net", [TellingNet, BranchingNet])
def test_every_rank_takes_the_same_plan(tmp_path, net):
    first, second = train(net, tmp_path, noise=NOISE).told()
    assert [record["step"] for record in first["history"] if not record["is_check"]] == [4, 8, 12]
    assert first == second
    assert first["plan"]
    assert first["sensitivities"]


def test_a_callback_under_stock_ddp_adapts_alike(tmp_path):
    mine = train(TellingNet, tmp_path, noise=NOISE)
    told = mine.told()
    stock = train(TellingNet, tmp_path, DDPStrategy(start_method="fork"), noise=NOISE)
    assert stock.told() == told
    assert_bit_equal(stock, mine)


@pytest.mark.parametrize("net", [FailingNet, StubbornNet])
def test_no_rank_waits_for_one_that_cannot_measure(tmp_path, net, monkeypatch):
    def warn(text: str, category: type[Warning]) -> None:
        with Path(tmp_path, "warnings.txt").open("a") as file:
            file.write(f"{category.__name__}: {text}\n")

    monkeypatch.setattr(adaptation, "rank_zero_warn", warn)
    first, second = train(net, tmp_path, noise=NOISE).told()
    assert first == second
    assert first["history"] == []
    assert first["plan"] == {}
    warned = Path(tmp_path, "warnings.txt").read_text().splitlines()
    assert any(line.startswith("ActMemWarning") and "another process" in line for line in warned)


def test_measuring_leaves_ddp_as_it_is(tmp_path, monkeypatch):
    """With a plan that stays the same, to the bit: no reducer has heard of the passes that measure."""
    monkeypatch.setattr(Adapter, "allocate", lambda _: [])
    adapting = train(TellingNet, tmp_path, noise=NOISE, adapt_every=2)
    assert len(adapting.told()[0]["history"]) >= 5
    assert_bit_equal(adapting, train(TellingNet, tmp_path))
