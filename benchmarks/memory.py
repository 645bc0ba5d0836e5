"""Measures stored bytes, peak memory and step time of a training step: plain, ActMem, checkpointing, offloading.

Run ``python -m benchmarks.memory``; ``--help`` lists the options and README.md explains the columns.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_actmem.config import BITS

from .measure import interleaved_seconds, peak_bytes, quantiles_20_50_80
from .methods import ActMem, BareHooks, CopyAlone, Method, all_methods
from .models import CHAIN_OPERATIONS, MODELS, workload
from .results import Row, append, environment

CSV = Path(__file__).with_name("results.csv")
CHAIN = "chain"
CHAIN_REPEATS_FACTOR = 10  # its steps are short
# Without and with derivation, with tensors too small to be packed or derived; and packed, by a codec that only copies:
# what it does by itself is measured beside it.
CHAIN_SETTINGS: tuple[dict[str, Any], ...] = (
    {"bits": 32},
    {"bits": 4},
    {"bits": 4, "codec": "identity", "min_elements": 0},
)
MIB = 2**20


def measure(
    name: str,
    batch: int | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    bits: Sequence[int] = (4,),
    repeats: int = 5,
    **fields: Any,
) -> list[Row]:
    """Measure every method on one model.

    Args:
        name: The model: one of `MODELS`.
        batch: Batch size, or ``None`` for the model's own.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"fp32"``, or ``"bf16"`` for autocast.
        bits: ActMem's bits per element, one row each; the chain of small operations has its own.
        repeats: Timed steps per method.
        **fields: Other settings of ActMem.

    Returns:
        A row per method, plain first.
    """
    is_chain = name == CHAIN
    repeats *= CHAIN_REPEATS_FACTOR if is_chain else 1
    work = workload(name, batch, device, dtype == "bf16")
    packed = [ActMem(**settings, **fields) for settings in CHAIN_SETTINGS]
    chain_methods = [Method(), *packed, CopyAlone(), BareHooks()]
    methods = chain_methods if is_chain else all_methods(tuple(bits), **fields)
    methods[0].step(work)  # makes the gradients
    stored = [method.stored(work) for method in methods]
    peaks = [peak_bytes(work, method) for method in methods]
    times = interleaved_seconds(work, methods, repeats, time.process_time if is_chain else time.perf_counter)
    rows = []
    for method, bytes_stored, peak, seconds in zip(methods, stored, peaks, times, strict=True):
        low, median, high = (round(1e3 * value, 3) for value in quantiles_20_50_80(seconds))
        total = bytes_stored.device_bytes + bytes_stored.host_bytes
        rows.append(
            Row(
                **environment(work.device),
                model=name,
                batch=len(work.inputs),
                dtype=dtype,
                method=method.name,
                bits=method.bits,
                stored_bytes=bytes_stored.device_bytes,
                host_bytes=bytes_stored.host_bytes,
                exact_bytes=bytes_stored.exact_bytes,
                ratio=round(stored[0].device_bytes / total, 3) if total else 1.0,
                peak_bytes=peak,
                step_ms_20=low,
                step_ms=median,
                step_ms_80=high,
                us_per_op=round(1e3 * median / CHAIN_OPERATIONS, 2) if is_chain else None,
                repeats=repeats,
                note=method.note(work),
            )
        )
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """Arrange rows for the eye; the CSV has all of their columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("model", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("stored\nMiB", "ratio", "peak\nMiB", "step\nms", "20 % to 80 %\nms"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.model,
            row.method if row.bits is None else f"{row.method} {row.bits}",
            f"{(row.stored_bytes + row.host_bytes) / MIB:.1f}",
            f"{row.ratio:.2f}",
            f"{row.peak_bytes / MIB:.1f}",
            f"{row.step_ms:.1f}",
            f"{row.step_ms_20:.1f} to {row.step_ms_80:.1f}",
        )
    return table


def overhead(rows: Sequence[Row]) -> str:
    """Say what the hooks cost: (packed - plain) / operations, forward and backward, less the codec's own work."""
    plain, *packed, codec, bare = rows
    least = (bare.us_per_op or 0.0) - (plain.us_per_op or 0.0)
    each = []
    for row in packed:
        settings = f" ({row.note})" if row.note else ""
        own = (codec.us_per_op or 0.0) if "identity" in row.note else 0.0
        each.append(f"{(row.us_per_op or 0.0) - (plain.us_per_op or 0.0) - own:.1f} us at bits={row.bits}{settings}")
    return (
        f"ActMem's overhead per operation, forward and backward, beyond the codec's work: {', '.join(each)}. "
        f"Hooks and a torch-function mode that do nothing: {least:.1f} us"
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=[8, 4, 2], help="default: 8 4 2")
    parser.add_argument("--batch", type=_positive, help="default: a small one for each model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast; default: fp32")
    parser.add_argument("--repeats", type=_positive, default=5, help="timed steps per method; default: 5")
    parser.add_argument("--no-derive", action="store_true", help="store, too, what ActMem would compute again")
    parser.add_argument("--offload", metavar="BYTES", help="ActMem leaves so much on the GPU ('2GiB'); 'true': little")
    parser.add_argument("--threads", type=_positive, default=1, help="of the CPU; one is least disturbed; default: 1")
    parser.add_argument("--csv", type=Path, default=CSV, help="the rows are appended here; default: beside the program")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU and a PyTorch built for it, and there is none. Use --device cpu.")
    if options.offload and options.device != "cuda":
        parser.error("--offload needs --device cuda: tensors move from there to the host.")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the models one after the other, and append each one's rows as soon as they are there."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    console = Console()
    for name in options.model:
        fields: dict[str, Any] = {"derive": False} if options.no_derive else {}
        if options.offload:
            fields["offload"] = options.offload == "true" or options.offload
        rows = measure(name, options.batch, options.device, options.dtype, options.bits, options.repeats, **fields)
        append(options.csv, rows)
        console.print(table_of(rows), "")
        if name == CHAIN:
            console.print(overhead(rows), "", soft_wrap=True)
    console.print(f"Rows appended to {options.csv}")


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler reports each start and stop on the console
    main()
