"""Pictures of the bits: in TensorBoard, and silently left out elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_actmem import ActMem
from lightning_actmem.integration import figures
from lightning_actmem.integration.figures import heat_map
from lightning_actmem.integration.history import Record
from tests.integration.support import PACK_ALL, Net, fit

SAMPLES = 32
HISTORY = [
    Record(step=10, epoch=0, noise=0.01, predicted_noise=0.01, planned_noise=0.04, bits={"a": 2.5, "b": 4.5}),
    Record(step=20, epoch=1, noise=0.04, predicted_noise=0.04, planned_noise=0.04, bits={"b": 3.5, "c": 8.5}),
]

pytestmark = pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")


def run(logger: Any) -> ActMem:
    actmem = ActMem(noise=0.05, **PACK_ALL)
    model = Net(batch_size=SAMPLES, samples=4 * SAMPLES)
    fit(model, callbacks=actmem, max_steps=-1, max_epochs=3, logger=logger, log_every_n_steps=1)
    return actmem


def test_tensorboard_gets_a_histogram_of_every_adaptation(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    history = run([CSVLogger(tmp_path), logger]).adaptation.history
    found = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload().Histograms("actmem/bits")
    assert [event.step for event in found] == [record.step for record in history]
    assert {4, 8} <= {event.step for event in found}
    for event, record in zip(found, history, strict=True):
        assert event.histogram_value.num == len(record.bits)
        assert event.histogram_value.sum == pytest.approx(sum(record.bits.values()))


class FigureLogger(CSVLogger):
    """Takes figures, and nothing else beside numbers."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.figures: list[tuple[str, Any, int]] = []

    @property
    def experiment(self) -> Any:
        experiment = super().experiment
        experiment.add_figure = lambda *arguments: self.figures.append(arguments)
        return experiment


@pytest.mark.parametrize("installed", [True, False])
def test_figures_need_matplotlib(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(figures, "find_spec", lambda _: installed or None)
    monkeypatch.setattr(figures, "heat_map", len)
    logger = FigureLogger(tmp_path)
    history = run(logger).adaptation.history
    wanted = [("actmem/bits_over_time", number, record.step) for number, record in enumerate(history, start=1)]
    assert logger.figures == (wanted if installed else [])


def test_the_heat_map_has_a_row_for_every_layer_and_a_column_for_every_adaptation():
    pytest.importorskip("matplotlib")
    axes, _ = heat_map(HISTORY).axes
    (image,) = axes.images
    assert image.get_array().shape == (3, 2)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert image.get_array()[1].tolist() == [4.5, 3.5]
    assert image.get_array().mask.tolist() == [[False, True], [False, False], [True, False]]
