"""What a run says of its adaptations: to loggers, and in words."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelSummary

from lightning_actmem import ActMem
from lightning_actmem.integration.adaptation import FIRST_BATCH
from tests.integration.adapting import NOISE, adaptations, run
from tests.integration.support import (
    PACK_ALL,
)
from tests.integration.test_metrics import ListLogger

pytestmark = pytest.mark.filterwarnings("ignore:ActMem. the gradient noise is")  # sub-batches of 4 samples scatter


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


@pytest.mark.parametrize("with_summary", [True, False])
def test_verbose_says_what_changes_and_why(with_summary, capsys):
    """Asked for by name it prints without Lightning's model summary too."""
    actmem = ActMem(noise=NOISE, verbose=True, summary=False, **PACK_ALL)
    callbacks = [ModelSummary()] if with_summary else []
    run(actmem=actmem, epochs=3, enable_model_summary=with_summary, callbacks=callbacks)
    text = capsys.readouterr().out
    first, second = adaptations(actmem)
    assert f"ActMem: bits at step {first.step}, epoch 1: noise " in text
    assert all(f"  {change}" in text for change in (*first.changes, *second.changes))
    assert "uniform-4 -> " in text
    assert first.changes
    for record in (first, second):
        tables = text.count(f"ActMem: what a training step has stored since step {record.step}")
        assert tables == bool(record.changes)


def test_nothing_is_printed_unless_asked(capsys):
    run(actmem=ActMem(noise=NOISE, summary=False, **PACK_ALL), enable_model_summary=True)
    assert "ActMem" not in capsys.readouterr().out
