"""Lightning's batch-size and learning-rate finders: compressed in every trial, and no trace of the trials after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_actmem import ActMem, ActMemStrategy
from tests.integration.support import PACK_ALL, Net, fit, is_untouched, new_trainer

TRIALS = {"steps_per_trial": 2, "max_trials": 3, "init_val": 4}
WAYS_IN = {
    "callback": lambda *tuners: {"callbacks": [ActMem(**PACK_ALL), *tuners]},
    "strategy": lambda *tuners: {"callbacks": list(tuners), "strategy": ActMemStrategy(**PACK_ALL)},
}

pytestmark = pytest.mark.parametrize("way", WAYS_IN)


class SizedNet(Net):
    """Notes the batch sizes that it is trained with."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note(str(len(batch[0])))
        return self.loss(batch)


def engine_of(trainer: Any) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, ActMem)).engine


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_batch_size_finder_measures_compressed_steps(tmp_path, way, mode):
    model = SizedNet()
    finder = BatchSizeFinder(mode, **TRIALS)
    trainer = fit(model, **WAYS_IN[way](finder), max_steps=3, default_root_dir=tmp_path)
    sizes = [int(size) for size, _ in model.seen]
    assert len(sizes) >= 2 * 3 + 3  # three trials (four in Lightning 2.5), and the run itself
    assert sizes[-1] > sizes[0]
    assert all(active for _, active in model.seen)
    assert engine_of(trainer).step == 3  # the trials' steps are rolled back
    assert is_untouched(trainer)


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_tuner_scales_the_batch_size_with_compressed_steps(tmp_path, way, mode):
    model = SizedNet()
    trainer = new_trainer(**WAYS_IN[way](), default_root_dir=tmp_path)
    found = Tuner(trainer).scale_batch_size(model, mode=mode, **TRIALS)
    assert found is not None
    assert found >= 8
    assert len(model.seen) >= 2 * 3
    assert all(active for _, active in model.seen)
    assert is_untouched(trainer)
    trainer.fit(model)
    assert engine_of(trainer).step == 3
    assert model.seen[-3:] == [(str(found), True)] * 3


def test_the_learning_rate_finder_runs_compressed(tmp_path, way):
    model = Net(lr=0.001)
    finder = LearningRateFinder(num_training_steps=20)
    trainer = fit(model, **WAYS_IN[way](finder), default_root_dir=tmp_path)
    assert len(model.seen) >= 20
    assert all(active for _, active in model.seen)
    assert engine_of(trainer).step == 3
    assert is_untouched(trainer)


def test_the_random_streams_go_on_as_without_compression(tmp_path, way):
    """Lightning's finder does not restore them; what it leaves is the same."""
    states = []
    for ways in (WAYS_IN[way], lambda: {}):
        torch.manual_seed(1)
        trainer = new_trainer(**ways(), default_root_dir=tmp_path)
        Tuner(trainer).scale_batch_size(SizedNet(), mode="power", **TRIALS)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
