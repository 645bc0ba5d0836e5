"""Two processes on the CPU: equal to stock DDP where lossless, noise of its own in each process where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_actmem import ActMem, ActMemDDPStrategy, ActMemStrategy
from lightning_actmem.integration import strategies
from lightning_actmem.integration.summary import TITLE
from tests.integration.support import PACK_ALL, Net, assert_bit_equal, fit, hooks_active

PROCESSES = 2
STEPS = 5

pytestmark = [
    pytest.mark.own_process,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed"),
]


class TellingNet(Net):
    """Writes down, from each process, what only that process knows."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        (actmem,) = (callback for callback in self.trainer.callbacks if isinstance(callback, ActMem))
        told = {
            "steps": actmem.engine.step,
            "rank": actmem.engine.rank,
            "active": [active for _, active in self.seen],
            "strategy": type(self.trainer.strategy).__name__,
            "gradient": self.noise(actmem),
        }
        Path(self.folder, f"rank{self.global_rank}.json").write_text(json.dumps(told))

    def noise(self, actmem: ActMem) -> list[float]:
        """The gradient of one step that is the same in all processes but for the noise."""
        layer = torch.nn.Linear(4, 1)
        torch.nn.init.ones_(layer.weight)
        x = torch.linspace(-1, 1, 128).reshape(32, 4).requires_grad_()
        with actmem.engine.compress(layer):
            assert hooks_active()
            loss = layer(x * 1).sum()
        loss.backward()
        return layer.weight.grad.flatten().tolist()

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(Path(self.folder, f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


def fit_ddp(model: Net, strategy: Any, **arguments: Any) -> Any:
    return fit(model, strategy=strategy, devices=PROCESSES, max_steps=STEPS, **arguments)


def test_lossless_ddp_gives_the_weights_of_stock_ddp(tmp_path):
    model = TellingNet(tmp_path)
    stock = Net()
    stock.load_state_dict(model.state_dict())
    fit_ddp(model, ActMemDDPStrategy(bits=32, start_method="fork"))
    fit_ddp(stock, DDPStrategy(start_method="fork"))
    assert_bit_equal(model, stock)
    assert [told["active"] for told in model.told()] == [[True] * STEPS] * PROCESSES


def test_a_callback_under_stock_ddp_does_the_same(tmp_path):
    """The strategy's own callback and a callback under the stock strategy differ in nothing."""
    first, second = (TellingNet(tmp_path) for _ in range(2))
    second.load_state_dict(first.state_dict())
    fit_ddp(first, ActMemDDPStrategy(bits=2, **PACK_ALL, start_method="fork"))
    fit_ddp(second, DDPStrategy(start_method="fork"), callbacks=ActMem(bits=2, **PACK_ALL))
    assert_bit_equal(first, second)


def test_each_process_has_its_rank_and_its_own_noise_and_logs_without_a_warning(tmp_path, monkeypatch, capfd):
    """``actmem`` by its single-device class: two devices make it DDP. Warnings are errors in the processes too."""
    monkeypatch.setattr(strategies, "_is_interactive", lambda: True)  # for processes by fork instead of by script
    logger = CSVLogger(tmp_path, version=0)
    model = TellingNet(tmp_path)
    trainer = fit_ddp(
        model, ActMemStrategy(bits=2, **PACK_ALL), logger=logger, log_every_n_steps=1, enable_model_summary=True
    )
    told = model.told()
    assert [each["rank"] for each in told] == [0, 1]
    assert [each["steps"] for each in told] == [STEPS] * PROCESSES
    assert {each["strategy"] for each in told} == {"ActMemDDPStrategy"}
    assert told[0]["gradient"] != told[1]["gradient"]
    assert capfd.readouterr().out.count(TITLE) == 1  # rank zero alone shows the table
    assert trainer.callback_metrics["actmem/ratio_epoch"] > 1
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"actmem/ratio", "actmem/ratio_epoch"} <= set(header)


@pytest.mark.slow
def test_the_strategy_can_be_sent_to_spawned_processes(tmp_path):
    model = TellingNet(tmp_path)
    fit_ddp(model, ActMemDDPStrategy(bits=2, **PACK_ALL, start_method="spawn"))
    assert [told["rank"] for told in model.told()] == [0, 1]
