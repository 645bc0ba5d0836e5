"""The moments of a step: the same for every batch size, and all of what the step takes."""

from __future__ import annotations

from typing import Any

import pytest
from torch.nn.modules import module as torch_module

from lightning_actmem import ActMem, ActMemBatchSizeFinder
from lightning_actmem.integration.batch_size import engine_of
from lightning_actmem.integration.moments import told_moments
from lightning_actmem.integration.trials import BatchTrials
from lightning_actmem.trial import Trial
from tests.integration.sized_nets import Mlp
from tests.integration.support import PACK_ALL, ManualNet, Net, assert_bit_equal, fit


class SmallData(Mlp):
    """Not two batches of the larger size."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = 24


def trials_of(model: Net, *callbacks: Any) -> list[Trial]:
    found = []

    class Measuring(ActMemBatchSizeFinder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            with BatchTrials(trainer, engine=engine_of(trainer)) as trials:
                found.extend(trials.run(batch_size, moments=True) for batch_size in (8, 16))

    fit(model, callbacks=[*callbacks, Measuring()], max_steps=1)
    return found


@pytest.mark.parametrize("build", [Mlp, ManualNet, SmallData])
@pytest.mark.parametrize("packed", [False, True])
def test_both_batch_sizes_have_the_same_moments(build, packed):
    small, large = trials_of(build(), *([ActMem(**PACK_ALL)] if packed else []))
    assert len(small.moments) == len(large.moments) > 10
    assert max(small.moments) == small.peak_bytes
    assert max(large.moments) == large.peak_bytes


def test_steps_are_as_without_and_leave_no_hooks():
    told = []

    class Telling(ActMem):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.context = told_moments(trainer, lambda: told.append("begin"), lambda: told.append("mark"))
            self.context.__enter__()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.context.__exit__(None, None, None)

    assert_bit_equal(
        fit(callbacks=Telling(**PACK_ALL)).lightning_module, fit(callbacks=ActMem(**PACK_ALL)).lightning_module
    )
    assert told.count("begin") == 3
    assert told.count("mark") % 3 == 0
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
