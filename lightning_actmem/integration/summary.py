"""The per-layer table of what a training step has stored: with rich where it is installed, else plain."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelSummary

from ..memory import human_bytes as human_bytes
from ..report import LayerRow, StepReport
from ..saved.ledger import BORROWED
from .history import Record

TITLE = "ActMem: what the first training step has stored for its backward pass"
MAX_ROWS = 20
PLAIN_WIDTH = 120
_HEADER = ("layer", "operations", "kind", "codec", "tensors", "plain", "stored", "ratio")
_LEFT_ALIGNED = 4

Cells = tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """The table as text.

    Args:
        title: What it is.
        header: Column names.
        layers: Rows by layer, the layers with the most bytes first; the last one stands for all that are cut.
        totals: Rows by kind.
        notes: Lines below the table.
    """

    title: str
    header: Cells
    layers: tuple[Cells, ...]
    totals: tuple[Cells, ...]
    notes: tuple[str, ...]


def prints(trainer: Trainer) -> bool:
    """Whether this process is the one that prints, and the trainer prints at all."""
    return trainer.is_global_zero and not trainer.barebones


def wants_summary(trainer: Trainer) -> bool:
    """Whether the table is to be shown: where Lightning shows its own model summary too."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return prints(trainer) and any(isinstance(callback, ModelSummary) for callback in callbacks)


def show(trainer: Trainer, text: str) -> None:
    """Print without breaking a progress bar."""
    bar = trainer.progress_bar_callback
    if bar is None:
        print(text)
    else:
        bar.print(text)


def changes_text(record: Record, max_rows: int = MAX_ROWS) -> str:
    """Return in words what an adaptation has found and changed.

    Args:
        record: The adaptation.
        max_rows: Sites to name before the rest is only counted.

    Returns:
        One line for the noise, and one for every site that is stored in another way from now on.
    """
    lines = [
        f"ActMem: bits at step {record.step}, epoch {record.epoch}: noise {record.noise:.3g} (predicted "
        f"{record.predicted_noise:.3g}), from now on {record.planned_noise:.3g}; "
        f"{len(record.changes)} of the sites change"
    ]
    lines += [f"  {change}" for change in record.changes[:max_rows]]
    if len(record.changes) > max_rows:
        lines.append(f"  ... {len(record.changes) - max_rows} more")
    return "\n".join(lines)


def summarize(report: StepReport, title: str = TITLE, max_rows: int = MAX_ROWS) -> Summary:
    """Arrange a step's figures.

    Args:
        report: The step's report.
        title: What it is the report of.
        max_rows: Rows to show before the smaller layers are summed up in one.

    Returns:
        The table. Byte counts are in units of 1024 (1 KiB = 1024 B).
    """
    layers = _by_layer(row for row in report.rows if row.kind not in BORROWED and (row.raw_bytes or row.saved_bytes))
    shown: list[LayerRow] = []
    while layers and (not shown or len(shown) + len(layers[0]) <= max_rows):
        shown.extend(layers.pop(0))
    cells = [_layer_cells(row) for row in shown]
    if layers:
        cells.append(_rest_cells(layers))
    return Summary(title, _HEADER, tuple(cells), tuple(_total_cells(report)), tuple(_notes(report)))


def render(summary: Summary) -> str:
    """Return the table as it is printed: with rich where it is installed, else in plain text."""
    try:
        import rich.console  # noqa: F401
    except ImportError:
        return render_plain(summary)
    return _render_rich(summary)


def render_plain(summary: Summary) -> str:
    """Return the table in plain text."""
    rows = [summary.header, *summary.layers, *summary.totals]
    widths = [max(len(row[column]) for row in rows) for column in range(len(summary.header))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [summary.title, _plain_line(summary.header, widths), rule]
    lines += [_plain_line(row, widths) for row in summary.layers]
    lines += [rule, *(_plain_line(row, widths) for row in summary.totals), *summary.notes]
    return "\n".join(lines)


def _by_layer(rows: Iterable[LayerRow]) -> list[list[LayerRow]]:
    layers: dict[str, list[LayerRow]] = {}
    for row in rows:
        layers.setdefault(row.layer, []).append(row)
    return sorted(layers.values(), key=lambda layer: -sum(row.raw_bytes for row in layer))


def _layer_cells(row: LayerRow) -> Cells:
    return (
        row.layer or "(outside submodules)",
        ", ".join(row.operations),
        row.kind,
        row.codec,
        str(row.tensors),
        *_byte_cells(row.raw_bytes, row.saved_bytes),
    )


def _rest_cells(layers: Sequence[Sequence[LayerRow]]) -> Cells:
    rows = [row for layer in layers for row in layer]
    name = f"... {len(layers)} more {'layer' if len(layers) == 1 else 'layers'}"
    sums = sum(row.raw_bytes for row in rows), sum(row.saved_bytes for row in rows)
    return name, "", "", "", str(sum(row.tensors for row in rows)), *_byte_cells(*sums)


def _total_cells(report: StepReport) -> Iterable[Cells]:
    totals = {kind: sums for kind, sums in report.bytes_by_kind.items() if kind not in BORROWED}
    for kind, sums in sorted(totals.items(), key=lambda item: -item[1][0]):
        tensors = sum(row.tensors for row in report.rows if row.kind == kind)
        yield "all layers", "", kind, "", str(tensors), *_byte_cells(*sums)


def _byte_cells(raw_bytes: int, saved_bytes: int) -> Cells:
    ratio = f"{raw_bytes / saved_bytes:.1f}" if saved_bytes else "-"
    return human_bytes(raw_bytes), human_bytes(saved_bytes), ratio


def _notes(report: StepReport) -> Iterable[str]:
    yield (
        f"Largest at one time: {human_bytes(report.saved_bytes)} stored where plain training keeps "
        f"{human_bytes(report.raw_bytes)} (ratio {report.ratio:.2f}, {report.bits_per_element:.2f} bits per element)."
    )
    if report.device_bytes is not None and report.offloaded_bytes is not None:
        yield (
            f"Of it on the device {human_bytes(report.device_bytes)} at one time, what is under way included, and on "
            f"the host {human_bytes(report.offloaded_bytes)}."
        )
    borrowed = [(kind, report.bytes_by_kind[kind][0]) for kind in sorted(BORROWED) if kind in report.bytes_by_kind]
    if borrowed:
        listed = ", ".join(f"{kind} {human_bytes(count)}" for kind, count in borrowed)
        yield f"Alive anyway, so neither packed nor counted: {listed}."


def _plain_line(cells: Cells, widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if column < _LEFT_ALIGNED else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _render_rich(summary: Summary) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=summary.title, title_justify="left", header_style="bold magenta")
    for column, name in enumerate(summary.header):
        table.add_column(name, justify="left" if column < _LEFT_ALIGNED else "right", no_wrap=column >= _LEFT_ALIGNED)
    for section in (summary.layers, summary.totals):
        for row in section:
            table.add_row(*(Text(cell) for cell in row))  # Text: a layer path may look like markup
        table.add_section()
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else PLAIN_WIDTH
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=width)
    with console.capture() as capture:
        console.print(table)
        for note in summary.notes:
            console.print(Text(note), soft_wrap=True)
    return capture.get().rstrip("\n")
