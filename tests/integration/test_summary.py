"""The table after the first step: what is in it, and when it is shown."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import lightning
import pytest
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar

from lightning_actmem import ActMem, LayerRow, StepReport
from lightning_actmem.integration.summary import TITLE, human_bytes, render, render_plain, summarize
from tests.integration.support import BAREBONES, PACK_ALL, fit

KIB = 1024


def row(layer: str, raw_kib: int, kind: str = "packed", codec: str = "uniform-4", saved_kib: int | None = None) -> Any:
    saved = raw_kib // 8 if saved_kib is None else saved_kib
    return LayerRow(layer, ("linear",), kind, codec, 1, raw_kib * KIB, saved * KIB)


def report(*rows: LayerRow) -> StepReport:
    by_kind: dict[str, tuple[int, int]] = {}
    for each in rows:
        raw, saved = by_kind.get(each.kind, (0, 0))
        by_kind[each.kind] = raw + each.raw_bytes, saved + each.saved_bytes
    return StepReport(16 * KIB, 64 * KIB, 16 * KIB, 16 * KIB, None, by_kind, rows)


REPORT = report(
    row("small", 8),
    row("attention", 16, "attention", "exact", 16),
    row("big", 64),
    row("small", 24),
    row("big", 0, codec="shared"),
    row("big", 40, "weight", "exact", 40),
    row("", 2048, "input", "exact", 2048),
)


def test_layers_come_by_size_and_what_is_borrowed_or_shared_has_no_row():
    summary = summarize(REPORT)
    assert [cells[0] for cells in summary.layers] == ["big", "small", "small", "attention"]
    assert summary.layers[0] == ("big", "linear", "packed", "uniform-4", "1", "64.0 KiB", "8.0 KiB", "8.0")
    assert [cells[2:] for cells in summary.totals] == [
        ("packed", "", "4", "96.0 KiB", "12.0 KiB", "8.0"),
        ("attention", "", "1", "16.0 KiB", "16.0 KiB", "1.0"),
    ]
    assert summary.notes == (
        "Largest at one time: 16.0 KiB stored where plain training keeps 64.0 KiB (ratio 4.00, 8.00 bits per element).",
        "Alive anyway, so neither packed nor counted: input 2.0 MiB, weight 40.0 KiB.",
    )


def test_many_layers_are_cut_and_summed_up():
    layers = [row(f"layer{index}", 8 * (30 - index)) for index in range(30)]
    cells = summarize(report(*layers), max_rows=20).layers
    assert len(cells) == 21
    assert cells[19][0] == "layer19"
    assert cells[20] == ("... 10 more layers", "", "", "", "10", "440.0 KiB", "55.0 KiB", "8.0")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**40 * 3000, "3000.0 TiB")]
)
def test_byte_counts_are_read_in_units_of_1024(count, text):
    assert human_bytes(count) == text


def test_the_plain_table_has_aligned_columns():
    lines = render_plain(summarize(REPORT)).splitlines()
    assert lines[0] == TITLE
    assert lines[1].split() == ["layer", "operations", "kind", "codec", "tensors", "plain", "stored", "ratio"]
    stop = lines[1].rindex("ratio") + len("ratio")
    assert all(len(line) == stop for line in lines[1:10])


def test_rich_and_plain_tell_the_same(monkeypatch):
    summary = summarize(REPORT)
    rich = render(summary)
    assert "┃" in rich

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_rich)
    for name in [name for name in sys.modules if name.startswith("rich")]:
        monkeypatch.delitem(sys.modules, name)
    plain = render(summary)
    assert plain == render_plain(summary)
    for cells in (*summary.layers, *summary.totals):
        for cell in cells:
            assert cell in rich
            assert cell in plain


def test_a_layer_path_that_looks_like_markup_is_shown_as_it_is():
    assert "[bold]net" in render(summarize(report(row("[bold]net", 8))))


SHOWN = {
    "with Lightning's model summary": (True, {}, {}),
    "under fast_dev_run": (True, {}, {"fast_dev_run": 2}),
    "under a tqdm bar": (True, {}, {"enable_progress_bar": True, "callbacks": [TQDMProgressBar]}),
    "under a rich bar": (True, {}, {"enable_progress_bar": True, "callbacks": [RichProgressBar]}),
    "without the model summary": (False, {}, {"enable_model_summary": False}),
    "under barebones": (False, {}, {"callbacks": [ModelSummary], "enable_model_summary": False, **BAREBONES}),
    "with summary=False": (False, {"summary": False}, {}),
}


@pytest.mark.parametrize("case", SHOWN)
def test_the_table_is_shown_once_per_run(capsys, case):
    if "rich" in case and lightning.__version__.startswith("2.5"):
        pytest.skip(
            "Lightning's rich progress bar before 2.6 fails under rich 14.1 and newer, without this project too"
        )
    shown, settings, arguments = SHOWN[case]
    others = [callback() for callback in arguments.get("callbacks", ())]
    arguments = {"enable_model_summary": True, **arguments, "callbacks": [ActMem(**PACK_ALL, **settings), *others]}
    fit(**arguments)
    assert capsys.readouterr().out.count(TITLE) == shown
