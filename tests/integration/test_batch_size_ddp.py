"""`ActMemBatchSizeFinder` under DDP: one batch for all processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_actmem import ActMemBatchSizeFinder
from tests.integration.sized_nets import SizedNet
from tests.integration.support import (
    fit,
)


class TellingNet(SizedNet):
    """Writes down what each process has found; the second one has less memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and len(batch[0]) > 60:
            raise RuntimeError("CUDA out of memory")
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        Path(self.folder, f"rank{self.global_rank}.json").write_text(json.dumps([self.batch_size, self.sizes[-1]]))


@pytest.mark.slow
@pytest.mark.own_process
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_all_processes_take_the_batch_of_the_one_with_the_least_memory(tmp_path):
    model = TellingNet(tmp_path)
    fit(
        model,
        callbacks=[ActMemBatchSizeFinder("1MiB", max_trials=8)],
        strategy=DDPStrategy(start_method="spawn"),  # torch's profiler does not survive a fork
        devices=2,
        max_steps=2,
    )
    told = [json.loads(Path(tmp_path, f"rank{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert 30 <= told[0][0] <= 60
    assert told[0][0] == told[0][1]
