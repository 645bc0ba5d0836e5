"""Offload under the Trainer: refused at the start without a GPU; else the same weights, and figures of both places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.loggers import CSVLogger

from lightning_actmem import ActMem, ActMemBatchSizeFinder, ActMemError, ActMemStrategy, StepReport, plan
from lightning_actmem.integration.summary import render_plain, summarize
from lightning_actmem.saved.offload import Offload
from lightning_actmem.saved.transport import CudaTransport, Transport
from tests.integration.support import PACK_ALL, Net, assert_bit_equal, fit, new_trainer
from tests.saved.slow_transport import SlowTransport


class Offloading(ActMem):
    """Moves everything, in parcels small enough for the tests' models; on the CPU unless another transport is given."""

    def __init__(self, transport: Transport | None = None, **fields: Any) -> None:
        super().__init__(**{**PACK_ALL, **fields})
        self.transport = SlowTransport()
        self.engine._store.offload = Offload(
            self.engine.ledger, 0, transport or self.transport, parcel_bytes=1024, under_way=1, least_bytes=0
        )
        self.reports: list[StepReport] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.reports.append(self.engine.report())


def train(actmem: ActMem, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    return fit(Net(batch_size=128), callbacks=actmem, **arguments)


@pytest.mark.parametrize("build", [ActMem, ActMemStrategy], ids=["callback", "strategy"])
@pytest.mark.parametrize("offload", [True, "1MiB"])
def test_on_the_cpu_the_run_ends_before_it_begins(build: Any, offload: Any) -> None:
    model = Net()
    placed = {"callbacks" if build is ActMem else "strategy": build(offload=offload)}  # as such no error
    with pytest.raises(ActMemError, match=r"offload moves packed tensors .*(no CUDA|run on 'cpu').* offload=False"):
        fit(model, **placed)
    assert model.seen == []


@pytest.mark.parametrize("build", [ActMemBatchSizeFinder, BatchSizeFinder])
@pytest.mark.parametrize("finder_is_first", [False, True])
@pytest.mark.parametrize("way", ["callback", "strategy"])
def test_no_batch_size_is_looked_for_with_it_on_the_cpu(build: Any, finder_is_first: bool, way: str) -> None:
    model = Net(batch_size=4)
    actmem = [ActMem(offload="1MiB")] if way == "callback" else []
    placed = {"strategy": ActMemStrategy(offload="1MiB")} if way == "strategy" else {}
    callbacks: list[Callback] = [build(), *actmem] if finder_is_first else [*actmem, build()]
    with pytest.raises(ActMemError, match=r"offload moves packed tensors .*(no CUDA|run on 'cpu').* offload=False"):
        fit(model, callbacks=callbacks, **placed)
    assert model.seen == []
    assert model.batch_size == 4


def test_settings_for_a_gpu_do_no_harm_elsewhere() -> None:
    trainer = new_trainer(callbacks=ActMem(offload=True))
    trainer.validate(Net(), Net().loader(), verbose=False)  # nothing is packed in it
    stored = [
        plan(Net(), config={**PACK_ALL, "offload": offload}, bits=[4], trace=(8, 16)).method("4 bits").stored_bytes
        for offload in (True, False)
    ]
    assert stored[0] == stored[1]


def test_weights_are_those_without() -> None:
    actmem = Offloading(bits=4)
    with_offload = train(actmem, max_steps=6).lightning_module
    without = train(ActMem(bits=4, **PACK_ALL), max_steps=6).lightning_module
    assert isinstance(with_offload, Net)
    assert_bit_equal(with_offload, without)
    assert actmem.transport.calls["bring"] > 0
    assert actmem.transport.freed_early == 0
    assert not actmem.transport.idle  # given back when the run is over


@pytest.mark.gpu
def test_on_a_gpu_weights_are_those_without() -> None:
    on_gpu = {"accelerator": "gpu", "devices": 1, "max_steps": 6}
    actmem = Offloading(CudaTransport(), bits=4)
    with_offload = train(actmem, **on_gpu).lightning_module
    without = train(ActMem(bits=4, **PACK_ALL), **on_gpu).lightning_module
    assert isinstance(with_offload, Net)
    assert_bit_equal(with_offload, without)
    assert actmem.reports[-1].offloaded_bytes


def test_both_places_are_logged(tmp_path: Any) -> None:
    actmem = Offloading(bits=4)
    trainer = train(actmem, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    report = actmem.reports[-1]
    assert trainer.callback_metrics["actmem/device_bytes"] == report.device_bytes
    assert trainer.callback_metrics["actmem/offloaded_bytes"] == report.offloaded_bytes
    assert report.offloaded_bytes
    assert report.device_bytes
    assert report.saved_bytes <= report.device_bytes + report.offloaded_bytes
    places = {(report.device_bytes, report.offloaded_bytes) for report in actmem.reports}
    assert len(places) == 1  # each step like the other


def test_without_offload_nothing_is_said_of_places() -> None:
    actmem = ActMem(**PACK_ALL)
    trainer = train(actmem)
    assert not {"actmem/device_bytes", "actmem/offloaded_bytes"} & set(trainer.callback_metrics)
    assert "on the host" not in render_plain(summarize(actmem.engine.report()))


def test_the_table_tells_both_places() -> None:
    actmem = Offloading(bits=4)
    train(actmem)
    text = render_plain(summarize(actmem.reports[0]))
    assert "Of it on the device " in text
    assert "on the host " in text
