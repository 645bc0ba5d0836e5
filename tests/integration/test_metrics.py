"""The figures in every logger, in the progress bar and in ``callback_metrics``: the right names, exact, and silent."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_actmem import ActMem, ActMemStrategy, StepReport
from lightning_actmem.integration.metrics import StepMetrics
from tests.integration.support import BAREBONES, PACK_ALL, LbfgsNet, ManualNet, Net, dataset, fit, new_trainer

NAMES = {f"actmem/{name}" for name in ("saved_bytes", "raw_bytes", "ratio", "bits_per_element", "pack_ms")}
EPOCH_NAMES = {f"{name}_epoch" for name in NAMES}


class GrowingNet(Net):
    """Batches of 4, 8, 12, ... samples: the figures differ from step to step."""

    def train_dataloader(self) -> Any:
        bounds = torch.arange(8).mul(4).cumsum(0).tolist()
        parts = [list(range(start, stop)) for start, stop in itertools.pairwise(bounds)]
        return DataLoader(dataset(self.samples), batch_sampler=parts)


class Reporting(ActMem):
    """Keeps every step's own report beside what gets logged."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.reports: list[StepReport] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.reports.append(self.engine.report())


class ListLogger(Logger):
    """Keeps what it is given."""

    name = version = "list"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("way", ["callback", "strategy"])
def test_csv_and_tensorboard_get_every_figure_per_step_and_epoch(tmp_path, way):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    arguments = {"callbacks": ActMem()} if way == "callback" else {"strategy": ActMemStrategy()}
    fit(logger=loggers, log_every_n_steps=1, max_steps=2, **arguments)

    rows = read_csv(Path(loggers[0].log_dir, "metrics.csv"))
    assert [row.keys() - {"epoch", "step"} for row in rows] == [NAMES, NAMES, EPOCH_NAMES]
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert set(events.Tags()["scalars"]) == NAMES | EPOCH_NAMES | {"epoch"}
    assert [event.step for event in events.Scalars("actmem/ratio")] == [0, 1]


def test_step_values_are_exact_and_epoch_values_the_mean_over_all_steps():
    """Also where only every third step is logged."""
    logger = ListLogger()
    actmem = Reporting(**PACK_ALL)
    fit(GrowingNet(), logger=logger, log_every_n_steps=3, max_steps=-1, max_epochs=1, callbacks=actmem)
    reports = actmem.reports
    assert len(reports) == 7
    assert len({report.saved_bytes for report in reports}) == 7
    for name in ("saved_bytes", "raw_bytes", "ratio", "bits_per_element", "pack_ms"):
        steps = [getattr(report, name) for report in reports]
        assert logger.column(f"actmem/{name}") == [steps[2], steps[5]]
        assert logger.column(f"actmem/{name}_epoch") == [pytest.approx(sum(steps) / 7, rel=1e-12)]


def test_byte_counts_that_float32_cannot_hold_stay_exact(monkeypatch):
    count = 2**40 + 1
    monkeypatch.setattr(StepReport, "metrics", lambda _: {"actmem/saved_bytes": float(count)})
    logger = ListLogger()
    trainer = fit(logger=logger, log_every_n_steps=1, max_steps=2, callbacks=ActMem())
    assert logger.column("actmem/saved_bytes") == [count] * 2
    assert logger.column("actmem/saved_bytes_epoch") == [count]
    assert trainer.callback_metrics["actmem/saved_bytes"] == count


def test_the_epoch_mean_starts_again_in_each_epoch(monkeypatch):
    figures = iter(range(6))
    monkeypatch.setattr(StepReport, "metrics", lambda _: {"actmem/ratio": float(next(figures))})
    logger = ListLogger()
    fit(logger=logger, max_steps=-1, max_epochs=2, limit_train_batches=3, callbacks=ActMem(summary=False))
    assert logger.column("actmem/ratio_epoch") == [1.0, 4.0]


def test_steps_that_nobody_reads_cost_no_call_of_log(monkeypatch):
    calls = []
    log = Net.log

    def counting_log(self: Net, name: str, *args: Any, **kwargs: Any) -> None:
        calls.append(name)
        log(self, name, *args, **kwargs)

    monkeypatch.setattr(Net, "log", counting_log)
    fit(logger=ListLogger(), log_every_n_steps=50, max_steps=20, callbacks=ActMem())
    assert calls.count("actmem/ratio") == 1
    assert calls.count("actmem/ratio_epoch") == 1


class ReadingBar(TQDMProgressBar):
    shown: dict[str, Any]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.shown = self.get_metrics(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)


def test_the_progress_bar_shows_the_ratio_alone(capsys):
    bar = ReadingBar()
    actmem = ActMem()
    fit(callbacks=[actmem, bar], enable_progress_bar=True)
    assert bar.shown.keys() - {"v_num"} == {"actmem/ratio"}
    assert bar.shown["actmem/ratio"] == pytest.approx(actmem.engine.report().ratio)
    assert "actmem/ratio=" in capsys.readouterr().out


@pytest.mark.parametrize("monitor", ["actmem/ratio", "actmem/ratio_epoch"])
def test_early_stopping_can_watch_a_figure(monitor):
    stopping = EarlyStopping(monitor, mode="max", patience=2, check_on_train_epoch_end=True)
    trainer = fit(max_steps=-1, max_epochs=9, limit_train_batches=2, callbacks=[ActMem(), stopping])
    assert trainer.current_epoch == 3  # one epoch to set the mark, two of patience
    assert trainer.callback_metrics[monitor] == stopping.best_score


@pytest.mark.parametrize("arguments", [{"logger": False}, {"fast_dev_run": 2, "logger": True}, BAREBONES])
def test_runs_without_a_logger_are_silent_and_compressed(arguments):
    """Warnings are errors here: Lightning warns of every ``log`` under ``barebones``."""
    actmem = ActMem(**PACK_ALL)
    trainer = fit(callbacks=actmem, **arguments)
    assert actmem.engine.step == trainer.lightning_module.seen.count(("train", True)) >= 2
    assert ("actmem/ratio" in trainer.callback_metrics) != ("barebones" in arguments)


@pytest.mark.parametrize(
    ("net", "arguments", "steps"),
    [(LbfgsNet, {}, 3), (ManualNet, {"max_steps": 6}, 3), (Net, {"accumulate_grad_batches": 2}, 6)],
)
def test_every_way_of_optimising_logs_one_row_per_step(net, arguments, steps):
    logger = ListLogger()
    actmem = Reporting(**PACK_ALL)
    fit(net(), logger=logger, log_every_n_steps=1, callbacks=actmem, **arguments)
    assert len(logger.column("actmem/ratio")) == 3
    assert len(actmem.reports) == steps
    assert logger.column("actmem/saved_bytes")[-1] == actmem.reports[-1].saved_bytes


def test_a_batch_without_a_compressed_step_is_not_counted():
    actmem = ActMem()
    metrics = StepMetrics(actmem.engine)
    metrics.log_step(new_trainer(), Net())  # would fail: this model has no trainer to log to
    metrics.log_epoch(Net())


def test_a_wholly_compiled_model_logs_nothing():
    model = Net()
    model._compiler_ctx = {}  # Lightning's mark on a compiled module
    logger = ListLogger()
    with pytest.warns(UserWarning, match="compiled as a whole"):
        fit(model, logger=logger, log_every_n_steps=1, callbacks=ActMem(summary=True), enable_model_summary=True)
    assert not logger.column("actmem/ratio")
