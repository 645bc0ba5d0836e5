"""Bits that adapt in a run: when, on which data, unseen by the rest of the run, and within the noise allowed."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, ModelSummary
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_actmem import ActMem, ActMemStrategy, ActMemWarning
from lightning_actmem.adapt.adapter import Adapter
from lightning_actmem.integration.adaptation import CHECK_PASSES, FIRST_BATCH, MAX_CHECKS
from lightning_actmem.integration.history import Record
from tests.integration.support import (
    BAREBONES,
    PACK_ALL,
    IteratorNet,
    LbfgsNet,
    ManualNet,
    Net,
    assert_bit_equal,
    dataset,
    fit,
    is_untouched,
    new_trainer,
)
from tests.integration.test_metrics import ListLogger
from tests.integration.test_quiet import BusyNet

SAMPLES = 32
NOISE = 0.05
# With two sub-batches a measurement of the noise scatters; this is what the mean over a run's may exceed.
TOLERANCE = 1.2

pytestmark = pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")  # sub-batches of 4 samples scatter


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


def test_the_noise_stays_within_what_is_allowed():
    trainer, actmem = run(batches=20, epochs=6)
    history = actmem.adaptation.history
    assert [record.step for record in adaptations(actmem)] == [10, *range(20, 120, 20)]
    first, *others = history
    assert first.noise < NOISE  # 4 bits everywhere
    assert max(record.planned_noise for record in history) <= NOISE
    assert sum(record.noise for record in others) / len(others) < NOISE * TOLERANCE
    assert any(record.changes for record in history)
    assert actmem.engine.plan
    assert is_untouched(trainer)


def test_a_budget_is_kept():
    default = run(actmem=ActMem(**PACK_ALL))[1].engine.report()
    budget = default.saved_bytes * 3 // 4
    _, actmem = run(actmem=ActMem(budget=str(budget), **PACK_ALL))
    assert actmem.adaptation.history
    assert actmem.engine.report().saved_bytes <= budget
    assert actmem.engine.report().saved_bytes < default.saved_bytes


@pytest.mark.parametrize(
    ("every", "batches", "epochs", "steps"),
    [
        (0, 12, 3, [FIRST_BATCH, 12, 24]),
        (0, 4, 3, [4, 8]),
        (0, 30, 1, [FIRST_BATCH]),
        (8, 30, 1, [8, 16, 24]),
        (15, 20, 2, [FIRST_BATCH, 25]),
    ],
)
def test_when_it_adapts(every, batches, epochs, steps):
    """After ten batches, or in the second epoch, and then every epoch or so many batches."""
    _, actmem = run(batches=batches, epochs=epochs, actmem=ActMem(noise=NOISE, adapt_every=every, **PACK_ALL))
    assert [record.step for record in adaptations(actmem)] == steps


def test_without_a_goal_nothing_is_measured():
    _, actmem = run(actmem=ActMem(**PACK_ALL))
    assert actmem.adaptation.history == []
    assert actmem.engine.plan == {}


MODES: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "automatic": (Net, {}),
    "busy": (BusyNet, {}),
    "manual": (ManualNet, {}),
    "accumulation": (Net, {"accumulate_grad_batches": 3}),
    "lbfgs": (LbfgsNet, {}),
    "clipping": (Net, {"gradient_clip_val": 0.1}),
    "bf16": (Net, {"precision": "bf16-mixed"}),
    "fp16": (BusyNet, {"plugins": lambda: MixedPrecision("16-mixed", "cpu")}),
    "validation": (Net, {"limit_val_batches": 2, "num_sanity_val_steps": 2}),
    "barebones": (Net, BAREBONES),
}


@pytest.mark.parametrize("mode", MODES)
def test_measuring_changes_nothing_of_the_run(mode, monkeypatch):
    """With a plan that is forced to stay the same, a run with adaptation is bit-equal to one without."""
    net, arguments = MODES[mode]

    def trained(actmem: ActMem) -> Any:
        made = {name: value() if callable(value) else value for name, value in arguments.items()}
        trainer, _ = run(net, batches=3, epochs=3, actmem=actmem, logger=False, **made)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return trainer, scaler and scaler.state_dict()

    measured: list[int] = []

    def allocate(self: Adapter) -> list[Any]:
        measured.append(self.count)
        return []

    monkeypatch.setattr(Adapter, "allocate", allocate)
    without, scaler = trained(ActMem(**PACK_ALL))
    adapting, other_scaler = trained(ActMem(noise=NOISE, adapt_every=2, **PACK_ALL))
    assert measured == [1, 2, 3, 4]
    assert_bit_equal(adapting.lightning_module, without.lightning_module)
    assert adapting.global_step == without.global_step
    assert scaler == other_scaler
    names = {name for name in without.callback_metrics if not name.startswith("actmem/pack_ms")}
    torch.testing.assert_close(
        {name: adapting.callback_metrics[name] for name in names},
        {name: without.callback_metrics[name] for name in names},
        rtol=0,
        atol=0,
    )


def test_the_loss_scale_does_not_enter_the_measurement():
    """It changes in the course of a run; what is averaged over adaptations must not."""

    class Scaled(MixedPrecision):
        def __init__(self, scale: float) -> None:
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    large, small = (
        run(batches=2, epochs=2, plugins=Scaled(scale))[1].adaptation.history[0].noise for scale in (1024.0, 1.0)
    )
    assert large == pytest.approx(small, rel=0.2)


def test_strategy_and_callback_adapt_alike():
    trainer, actmem = run()
    torch.manual_seed(0)
    model = Net(batch_size=SAMPLES, samples=4 * SAMPLES)
    strategy = ActMemStrategy(noise=NOISE, **PACK_ALL)
    fit(model, strategy=strategy, max_steps=-1, max_epochs=5)
    assert strategy.actmem.adaptation.history == actmem.adaptation.history
    assert_bit_equal(model, trainer.lightning_module)


def test_figures_reach_the_loggers_with_the_next_step_that_is_written():
    logger = ListLogger()
    _, actmem = run(batches=12, epochs=2, logger=logger, log_every_n_steps=4)
    history = actmem.adaptation.history
    assert history[0].step == FIRST_BATCH
    written = {row["step"]: row for row in logger.rows if "actmem/noise" in row and "actmem/ratio" in row}
    assert sorted(written) == [11, 15, 19, 23]
    for step, row in written.items():
        last = [record for record in history if record.step <= step][-1]
        assert last.metrics().items() <= row.items()
    assert {"actmem/bits/net.1", "actmem/predicted_noise"} <= written[11].keys()


def test_figures_of_an_epoch_without_a_written_step_come_at_its_end():
    logger = ListLogger()
    _, actmem = run(batches=4, epochs=2, logger=logger, log_every_n_steps=50)
    *_, record = actmem.adaptation.history  # the check of what the first has set
    assert logger.column("actmem/noise") == [record.noise]
    assert logger.column("actmem/bits/net.1") == [record.bits["net.1"]]


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


def exaggerate(monkeypatch: pytest.MonkeyPatch, factor: float, count: int) -> None:
    """Have a run's checks find more noise than there is, so many times."""
    take = Adapter._take
    left = [count]

    def wrong(self: Adapter, measurement: Any) -> None:
        take(self, measurement)
        is_check = measurement.passes <= CHECK_PASSES
        if is_check and left[0]:
            left[0] -= 1
            self.measured_noise = factor * NOISE

    monkeypatch.setattr(Adapter, "_take", wrong)


def test_bits_go_up_at_once_where_a_plan_makes_more_noise_than_it_was_held_to(monkeypatch):
    exaggerate(monkeypatch, 1.5, count=1)
    _, actmem = run(batches=20, epochs=1)
    first, second, third = actmem.adaptation.history
    assert [record.step for record in (first, second, third)] == [10, 11, 12]
    assert [record.is_check for record in (first, second, third)] == [False, True, True]
    assert second.noise == 1.5 * NOISE
    assert second.planned_noise < first.planned_noise
    assert sum(second.bits.values()) > sum(first.bits.values())
    assert third.noise < NOISE
    assert third.bits == second.bits


def test_a_check_lets_pass_what_may_be_chance(monkeypatch):
    exaggerate(monkeypatch, 1.1, count=1)
    _, actmem = run(batches=20, epochs=1)
    first, second = actmem.adaptation.history
    assert second.is_check
    assert second.changes == ()
    assert second.bits == first.bits


def test_checks_come_to_an_end(monkeypatch):
    exaggerate(monkeypatch, 1.5, count=100)
    allocate = Adapter.allocate

    def restless(self: Adapter) -> list[Any]:
        return allocate(self) or ["something"]

    monkeypatch.setattr(Adapter, "allocate", restless)
    _, actmem = run(batches=20, epochs=1)
    assert [record.is_check for record in actmem.adaptation.history] == [False, *[True] * MAX_CHECKS]


@pytest.mark.filterwarnings("ignore:ActMem. budget='1000' asks for at most")
def test_a_budget_needs_no_check():
    _, actmem = run(batches=20, epochs=1, actmem=ActMem(budget="1000", **PACK_ALL))
    (record,) = actmem.adaptation.history
    assert record.changes


@pytest.mark.filterwarnings("default:ActMem. the gradient noise is")
def test_the_guard_warns_where_the_sum_over_the_sites_does_not_hold(monkeypatch):
    take = Adapter._take

    def wrong(self: Adapter, measurement: Any) -> None:
        take(self, measurement)
        self.measured_noise = 2 * self.expected_noise

    monkeypatch.setattr(Adapter, "_take", wrong)
    with pytest.warns(ActMemWarning, match="more than a factor of 1.5 apart"):
        run(epochs=2)


@pytest.mark.filterwarnings("error:ActMem. the gradient noise is")
def test_the_guard_is_silent_within_its_factor(monkeypatch):
    take = Adapter._take

    def close(self: Adapter, measurement: Any) -> None:
        take(self, measurement)
        self.measured_noise = 1.4 * self.expected_noise

    monkeypatch.setattr(Adapter, "_take", close)
    run(epochs=2)


class DryNet(Net):
    """Without dropout: Lightning's checkpoints have no random states."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Identity()

    def train_dataloader(self) -> Any:
        """The same batch again and again: Lightning starts a plain loader anew in the middle of an epoch."""
        return DataLoader(Subset(dataset(SAMPLES), list(range(SAMPLES)) * 6), batch_size=SAMPLES)


@pytest.mark.filterwarnings("error:ActMem. the gradient noise is")
def test_the_guard_waits_until_every_site_has_been_measured(monkeypatch):
    take = Adapter._take

    def partly(self: Adapter, measurement: Any) -> None:
        take(self, measurement)
        self.sensitivities.averages.popitem()
        self.measured_noise = 2 * self.expected_noise

    monkeypatch.setattr(Adapter, "_take", partly)
    run(epochs=2)


@pytest.mark.filterwarnings("error:ActMem. the gradient noise is")
@pytest.mark.parametrize("method", ["actnn", "gact"])
def test_the_published_methods_run_too(method):
    """Their laws do not claim to tell the variance, so no guard speaks up."""
    budget = run(actmem=ActMem(**PACK_ALL))[1].engine.report().saved_bytes
    _, actmem = run(actmem=ActMem(method=method, **PACK_ALL))
    assert len(adaptations(actmem)) == 4
    assert {spec.rounding for spec in actmem.engine.plan.values()} == {"stochastic"}
    assert actmem.engine.report().saved_bytes <= budget


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("stop", [5, 12])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, stop):
    """From the middle of an epoch, between an adaptation and the check of its plan, and from the end of an epoch."""

    def resumable(path: Path | None = None) -> Any:
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
        actmem = ActMem(noise=NOISE, adapt_every=4, **PACK_ALL)
        trainer = new_trainer(callbacks=[actmem, saving], max_steps=-1, max_epochs=4, enable_checkpointing=True)
        torch.manual_seed(0)
        model = DryNet()
        trainer.fit(model, ckpt_path=path)
        assert trainer.global_step == 24
        return model, actmem

    whole, first = resumable()
    resumed, second = resumable(tmp_path / f"step={stop}.ckpt")
    assert second.engine.step == 24
    assert_bit_equal(resumed, whole)
    assert second.engine.state_dict() == first.engine.state_dict()
    assert second.adaptation.state_dict() == first.adaptation.state_dict()
    assert len(adaptations(second)) == 5
    assert any(record.is_check for record in second.adaptation.history)
    assert any(record.changes for record in second.adaptation.history)


def test_the_state_is_loadable_with_weights_only():
    _, actmem = run()
    file = io.BytesIO()
    torch.save(actmem.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = ActMem(noise=NOISE, **PACK_ALL)
    other.load_state_dict(state)
    assert other.state_dict() == actmem.state_dict()
    assert other.adaptation.history[0].bits == actmem.adaptation.history[0].bits


def test_a_state_without_adaptation_is_taken():
    """As versions before had it."""
    actmem = ActMem(noise=NOISE)
    actmem.load_state_dict({"version": 1, "step": 5})
    assert actmem.engine.step == 5
    assert actmem.adaptation.history == []


def test_after_a_batch_size_has_been_found_no_plan_stores_more_than_the_trials(tmp_path):
    """A noise this small would want nearly everything exact."""
    free = run(actmem=ActMem(noise=1e-6, **PACK_ALL))[1].engine.report()
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=16)
    actmem = ActMem(noise=1e-6, **PACK_ALL)
    trainer, _ = run(actmem=actmem, callbacks=[finder], default_root_dir=tmp_path)
    default = run(actmem=ActMem(**PACK_ALL))[1].engine.report()
    assert actmem.adaptation.history
    assert actmem.adaptation.state_dict()["capped"]
    samples = trainer.lightning_module.batch_size
    assert free.saved_bytes > default.saved_bytes
    assert actmem.engine.report().saved_bytes * SAMPLES <= default.saved_bytes * samples


def test_the_learning_rate_finder_does_not_adapt(tmp_path):
    finder = LearningRateFinder(num_training_steps=20)
    _, actmem = run(batches=30, epochs=1, callbacks=[finder], default_root_dir=tmp_path)
    assert [record.step for record in adaptations(actmem)] == [FIRST_BATCH]


def test_verbose_says_what_changes_and_why(capsys):
    actmem = ActMem(noise=NOISE, verbose=True, summary=False, **PACK_ALL)
    run(actmem=actmem, epochs=3, enable_model_summary=True, callbacks=[ModelSummary()])
    text = capsys.readouterr().out
    first, second = adaptations(actmem)
    assert f"ActMem: bits at step {first.step}, epoch 1: noise " in text
    assert all(f"  {change}" in text for change in (*first.changes, *second.changes))
    assert "uniform-4 -> " in text
    for record in (first, second):
        assert (
            bool(record.changes) == text.count(f"ActMem: what a training step has stored since step {record.step}") == 1
        )


def test_nothing_is_printed_unless_asked(capsys):
    run(actmem=ActMem(noise=NOISE, summary=False, **PACK_ALL), enable_model_summary=True)
    assert "ActMem" not in capsys.readouterr().out


def test_a_batch_that_cannot_be_measured_leaves_it_to_the_next():
    class Sometimes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (FIRST_BATCH, FIRST_BATCH + 1) else super().training_step(batch, batch_idx)

    _, actmem = run(Sometimes, batches=20, epochs=1)
    assert [record.epoch for record in adaptations(actmem)] == [0]


def test_of_several_equal_ones_each_has_the_state_of_the_one_that_works():
    first, second = (ActMem(noise=NOISE, **PACK_ALL) for _ in range(2))
    run(actmem=first, callbacks=[second])
    assert first.adaptation.history
    assert second.state_dict() == first.state_dict()
    strategy, callback = ActMemStrategy(noise=NOISE, **PACK_ALL), ActMem(noise=NOISE, **PACK_ALL)
    run(actmem=callback, strategy=strategy)
    assert callback.adaptation.history
    assert strategy.actmem.state_dict() == callback.state_dict()


def test_another_run_with_the_same_callback_adapts_afresh():
    actmem = ActMem(noise=NOISE, **PACK_ALL)
    run(batches=12, epochs=3, actmem=actmem)
    actmem.adaptation.capped = True
    earlier = actmem.adaptation.history
    run(batches=20, epochs=1, actmem=actmem)
    record, *checks = actmem.adaptation.history
    assert (record.step, record.epoch, record.is_check) == (FIRST_BATCH, 0, False)
    assert all(check.is_check for check in checks)
    assert record is not earlier[0]
    assert (
        record.bits == run(batches=20, epochs=1, actmem=ActMem(noise=NOISE, **PACK_ALL))[1].adaptation.history[0].bits
    )
    assert actmem.adaptation.capped


def test_a_state_that_is_loaded_before_a_run_is_kept():
    _, actmem = run()
    other = ActMem(noise=NOISE, **PACK_ALL)
    other.load_state_dict(actmem.state_dict())
    run(batches=4, epochs=1, actmem=other)
    earlier = [record.state() for record in actmem.adaptation.history]
    assert [record.state() for record in other.adaptation.history[: len(earlier)]] == earlier


def test_a_batch_size_that_is_searched_for_on_resuming_keeps_its_cap():
    _, actmem = run()
    other = ActMem(noise=NOISE, **PACK_ALL)
    other.adaptation.capped = True
    other.load_state_dict(actmem.state_dict())
    assert other.adaptation.capped


def test_parts_that_are_too_small_for_packing_are_no_measurement_without_noise():
    """A part of four samples has a quarter of the elements that are packed in a batch."""
    actmem = ActMem(noise=NOISE, **PACK_ALL | {"min_elements": SAMPLES * 16})
    with pytest.warns(ActMemWarning, match=r"only 0% of the stored bytes could be measured on 4 of 32 samples"):
        run(batches=3, actmem=actmem)
    assert actmem.adaptation.history == []
    assert actmem.engine.plan == {}
