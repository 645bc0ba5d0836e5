"""Runs with bits that adapt, shared by the tests of adaptation."""

from __future__ import annotations

from typing import Any

import torch

from lightning_actmem import ActMem
from lightning_actmem.integration.history import Record
from tests.integration.support import (
    PACK_ALL,
    Net,
    fit,
)

SAMPLES = 32
NOISE = 0.05


def run(net: type[Net] = Net, *, batches: int = 4, epochs: int = 5, actmem: ActMem | None = None, **arguments: Any):
    """Train for some short epochs with a callback that adapts."""
    torch.manual_seed(0)
    model = net()
    model.batch_size, model.samples = SAMPLES, SAMPLES * batches
    actmem = ActMem(noise=NOISE, **PACK_ALL) if actmem is None else actmem
    callbacks = [actmem, *arguments.pop("callbacks", ())]
    trainer = fit(model, callbacks=callbacks, max_steps=-1, max_epochs=epochs, **arguments)
    return trainer, actmem


def adaptations(actmem: ActMem) -> list[Record]:
    return [record for record in actmem.adaptation.history if not record.is_check]
