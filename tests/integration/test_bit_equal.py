"""A lossless run trains to the same bits as a plain one, in every way of optimising that Lightning has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_actmem import ActMem, ActMemStrategy
from tests.integration.support import PACK_ALL, IteratorNet, LbfgsNet, ManualNet, Net, assert_bit_equal, fit

STEPS = 50

MODES: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "automatic": (Net, {}),
    "manual": (ManualNet, {"max_steps": 2 * STEPS}),  # Lightning counts the steps of both optimizers
    "accumulation": (Net, {"accumulate_grad_batches": 2}),
    "lbfgs": (LbfgsNet, {}),
    "clipping": (Net, {"gradient_clip_val": 0.1}),
    "bf16": (Net, {"precision": "bf16-mixed"}),
    "dataloader_iter": (IteratorNet, {}),
}
LOSSLESS: dict[str, dict[str, Any]] = {
    "bits32": {"bits": 32, **PACK_ALL},
    "identity": {"codec": "identity", **PACK_ALL},  # copies what is saved, so that the whole packing path runs
}


def train(net: type[Net], arguments: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    return fit(net(), **{"max_steps": STEPS, **arguments}, **more)


@pytest.mark.parametrize("mode", MODES)
def test_fifty_lossless_steps_give_the_weights_of_plain_training(mode):
    net, arguments = MODES[mode]
    plain = train(net, arguments)
    assert not any(active for _, active in plain.lightning_module.seen)
    for settings in LOSSLESS.values():
        for trainer in (
            train(net, arguments, callbacks=ActMem(**settings)),
            train(net, arguments, strategy=ActMemStrategy(**settings)),
        ):
            seen = trainer.lightning_module.seen
            assert len(seen) >= STEPS
            assert set(seen) == {("train", True)}
            assert_bit_equal(trainer.lightning_module, plain.lightning_module)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_lossy_run_differs_from_plain_training_and_repeats_itself(bits):
    first, second = (fit(callbacks=ActMem(bits=bits, **PACK_ALL)).lightning_module for _ in range(2))
    assert_bit_equal(first, second)
    with pytest.raises(AssertionError):
        assert_bit_equal(first, fit().lightning_module)


def test_another_seed_gives_other_noise():
    first, second = (fit(callbacks=ActMem(seed=seed, **PACK_ALL)).lightning_module for seed in (0, 1))
    with pytest.raises(AssertionError):
        assert_bit_equal(first, second)
