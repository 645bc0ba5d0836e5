"""The table of gradient errors: bias and variance apart, rows for what a codec has, and what the rows here say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gradient_error
from benchmarks.gradient_error import CODECS, Task, has_width, main, measure

ROWS = Path(gradient_error.__file__).with_name("gradient_error.csv")


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(256, 64)
    return model, lambda: (x, x), lambda batch: (model(batch[0]) - batch[1]).square().mean()


def of(task: Task, codec: str, bits: int, draws: int = 8) -> gradient_error.Error:
    return measure(task, task[1](), draws, bits, {"derive": False, **CODECS[codec]})


def test_nearest_is_all_bias_and_dither_nearly_all_variance(task: Task) -> None:
    nearest, dither = of(task, "min-max, nearest", 2), of(task, "min-max, subtractive dither", 2, draws=32)
    assert nearest.variance == 0
    assert nearest.squared_bias > 1e-4
    assert dither.variance > 1e-3
    # GELU's derivative is no linear function of what is rounded, which leaves some bias.
    assert abs(dither.squared_bias) < 0.1 * dither.variance


def test_the_mean_of_few_draws_is_not_taken_for_bias(task: Task) -> None:
    """Of a linear layer the gradient is unbiased; without the correction two draws would show half the variance."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) * batch[1]).mean()

    error = of((model, task[1], loss_of), "min-max, stochastic rounding", 1, draws=2)
    assert abs(error.squared_bias) < 0.2 * error.variance


def test_more_bits_cost_more_bytes_and_err_less(task: Task) -> None:
    for codec in ("rotated", "rotated, mean removed", "block floating point, dither", "measured"):
        less, more = of(task, codec, 2), of(task, codec, 4)
        assert less.stored_bytes < more.stored_bytes
        assert more.variance < 0.5 * less.variance


def test_the_mean_of_a_group_takes_two_bytes(task: Task) -> None:
    plain, centred = of(task, "rotated", 2), of(task, "rotated, mean removed", 2)
    groups = 256 * 64 // 256
    assert (centred.stored_bytes - plain.stored_bytes) % (2 * groups) == 0
    assert centred.stored_bytes > plain.stored_bytes
    assert of(task, "rotated, mean removed, groups of 512", 2).stored_bytes == plain.stored_bytes


def test_only_widths_that_a_codec_has() -> None:
    assert [bits for bits in (1, 2, 3, 4, 8) if has_width("rotated", bits)] == [1, 2, 3, 4]
    assert [bits for bits in (1, 2, 3, 4, 8) if has_width("fp8_e4m3", bits)] == [8]
    assert has_width("auto", 8)


def test_the_program_prints_a_table_and_appends_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    codecs = ["rotated", "float8 e4m3, stochastic rounding"]
    options = ["--models", "ResNet", "--codecs", *codecs, "--bits", "2", "8", "--draws", "2", "--warmup", "1"]
    main([*options, "--csv", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["codec"], row["bits"]) for row in rows] == [(codecs[0], "2"), (codecs[1], "8")]
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "| ResNet: squared bias + variance | 2 bit | 8 bit |"
    assert lines[3].endswith(" |  |")


def test_one_draw_has_no_variance(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--draws", "1"])
    assert "must be 2 or more, got 1" in capsys.readouterr().err


def test_the_rows_in_the_repository() -> None:
    """Rotated at 1 bit is no worse than what ActNN and GACT do at 2 bits, on the GPT."""
    with ROWS.open(newline="") as file:
        rows = {(row["model"], row["codec"], int(row["bits"])): row for row in csv.DictReader(file)}
    for model in ("GPT", "ResNet"):
        for codec, settings in CODECS.items():
            widths = {bits for name, of_codec, bits in rows if (name, of_codec) == (model, codec)}
            assert widths == {bits for bits in gradient_error.WIDTHS if has_width(settings["codec"], bits)}
    rotated, stochastic = (
        sum(float(rows["GPT", codec, bits][part]) for part in ("squared_bias", "variance"))
        for codec, bits in (("rotated", 1), ("min-max, stochastic rounding", 2))
    )
    assert rotated <= stochastic
