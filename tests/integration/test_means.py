"""The torchmetrics metrics: means over steps and adaptations that can be plotted, synchronised and reset."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_sum

from lightning_actmem import ActMem
from lightning_actmem.integration.history import Record
from lightning_actmem.integration.means import BitsPerElement, CompressionRatio, GradientNoise, StoredBytes
from tests.integration.support import PACK_ALL, fit

CLASSES: list[type[Metric]] = [CompressionRatio, StoredBytes, BitsPerElement, GradientNoise]
EMPTY = Record(step=0, epoch=0, noise=0.0, predicted_noise=0.0, planned_noise=0.0, bits={})


def report(bits: int):
    actmem = ActMem(bits=bits, **PACK_ALL)
    fit(callbacks=actmem, max_steps=1)
    return actmem.engine.report()


def test_means_over_steps():
    reports = [report(bits) for bits in (2, 8)]
    metrics = MetricCollection([CompressionRatio(), StoredBytes(), BitsPerElement()], compute_groups=False)
    for each in reports:
        metrics.update(each)
    found = metrics.compute()
    names = {"CompressionRatio": "ratio", "StoredBytes": "saved_bytes", "BitsPerElement": "bits_per_element"}
    for metric, name in names.items():
        assert found[metric] == sum(getattr(each, name) for each in reports) / 2
    metrics.reset()
    metrics.update(reports[0])
    assert metrics["CompressionRatio"].compute() == reports[0].ratio


def test_byte_counts_that_float32_cannot_hold_stay_exact():
    metric = StoredBytes()
    metric.update(dataclasses.replace(report(2), saved_bytes=2**40 + 1))
    assert metric.compute() == 2**40 + 1


def test_noise_is_the_mean_over_adaptations():
    metric = GradientNoise()
    for noise in (0.01, 0.05):
        metric.update(dataclasses.replace(EMPTY, noise=noise))
    assert metric.compute() == pytest.approx(0.03)


@pytest.mark.parametrize("metric", CLASSES, ids=lambda metric: metric.__name__)
def test_ranks_are_weighted_by_what_they_have_seen(metric):
    """As torchmetrics does it: states are summed over the ranks."""
    made = metric()
    assert set(made._defaults) == {"total", "count"}
    assert all(reduction is dim_zero_sum for reduction in made._reductions.values())


@pytest.mark.parametrize("metric", CLASSES, ids=lambda metric: metric.__name__)
def test_plot_draws_one_value_or_many(metric):
    pytest.importorskip("matplotlib").use("agg")
    figure, axes = metric().plot([torch.tensor(1.0), torch.tensor(2.0)])
    assert axes.figure is figure
