"""What cannot be measured in a run: said once, and trained on."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_actmem import ActMem, ActMemWarning
from lightning_actmem.integration.adaptation import FIRST_BATCH
from tests.integration.adapting import NOISE, SAMPLES, adaptations, run
from tests.integration.support import (
    PACK_ALL,
    IteratorNet,
    Net,
    assert_bit_equal,
)

pytestmark = pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")  # sub-batches of 4 samples scatter


class WideNet(Net):
    """Fails on anything but a whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(SAMPLES, -1))


class InfiniteNet(Net):
    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        return loss if len(batch[0]) == SAMPLES else loss * math.inf


class LoneNet(Net):
    """One sample in each batch."""

    def train_dataloader(self) -> Any:
        self.batch_size = 1
        return self.loader()


class SkippingNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if len(batch[0]) < SAMPLES else super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (IteratorNet, "fetches its batches itself"),
        (WideNet, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (InfiniteNet, "a gradient is not finite"),
        (LoneNet, "no tensor with more than one sample"),
        (SkippingNet, "training_step gave no loss"),
    ],
)
def test_what_cannot_be_measured_is_said_once_and_trains_on(net, reason):
    with pytest.warns(ActMemWarning, match=f"the bits do not adapt.*{reason}") as warned:
        trainer, actmem = run(net, batches=3, epochs=4, limit_train_batches=3)
    assert len([warning for warning in warned if warning.category is ActMemWarning]) == 1
    assert actmem.adaptation.history == []
    assert actmem.engine.plan == {}
    plain, _ = run(net, batches=3, epochs=4, limit_train_batches=3, actmem=ActMem(**PACK_ALL))
    assert_bit_equal(trainer.lightning_module, plain.lightning_module)


def test_sharded_parameters_are_refused(monkeypatch):
    monkeypatch.setattr(nn.Parameter, "device_mesh", "as a DTensor has it", raising=False)
    with pytest.warns(ActMemWarning, match="the parameters are sharded"):
        _, actmem = run(batches=2, epochs=2)
    assert actmem.adaptation.history == []


def test_a_batch_that_cannot_be_measured_leaves_it_to_the_next():
    class Sometimes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (FIRST_BATCH, FIRST_BATCH + 1) else super().training_step(batch, batch_idx)

    _, actmem = run(Sometimes, batches=20, epochs=1)
    assert [record.epoch for record in adaptations(actmem)] == [0]


def test_parts_that_are_too_small_for_packing_are_no_measurement_without_noise():
    """A part of four samples has a quarter of the elements that are packed in a batch."""
    actmem = ActMem(noise=NOISE, **PACK_ALL | {"min_elements": SAMPLES * 16})
    with pytest.warns(ActMemWarning, match=r"only 0% of the stored bytes could be measured on 4 of 32 samples"):
        run(batches=3, actmem=actmem)
    assert actmem.adaptation.history == []
    assert actmem.engine.plan == {}
