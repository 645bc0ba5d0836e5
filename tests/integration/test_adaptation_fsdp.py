"""Bits that adapt under FSDP2: they do not, which is said once, and training goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_actmem import ActMem


class Net(LightningModule):
    def configure_model(self):
        if hasattr(self, "net"):
            return
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
        for part in (self.net[0], self.net[2], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    actmem = ActMem(noise=0.05, min_elements=0, group_size=32, adapt_every=3)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        callbacks=actmem,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=8,
    )
    data = TensorDataset(torch.randn(256, 16), torch.randint(0, 4, (256,)))
    trainer.fit(Net(), DataLoader(data, batch_size=16))
    assert trainer.global_step == actmem.engine.step == 8
    assert actmem.engine.report().ratio > 4
    assert actmem.adaptation.history == []
    print("trained")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_sharded_training_goes_on_without_adaptation(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    repository = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths}
    found = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("trained") == 2
    assert found.stderr.count("the parameters are sharded") == 1
