"""The rows of the one CSV that every figure comes from."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One method on one model; README.md says what the columns mean."""

    date: str
    lightning_actmem: str
    torch: str
    triton: str
    device: str
    threads: int
    model: str
    batch: int
    dtype: str
    method: str
    bits: int | None
    stored_bytes: int
    host_bytes: int
    exact_bytes: int | None
    ratio: float
    peak_bytes: int
    step_ms_20: float
    step_ms: float
    step_ms_80: float
    us_per_op: float | None
    repeats: int
    note: str


COLUMNS = tuple(field.name for field in fields(Row))


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to the CSV, which begins with the names of the columns.

    Args:
        path: The file; made where it is missing.
        rows: The rows.

    Raises:
        ValueError: If the file has other columns.
    """
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            found = tuple(next(csv.reader(file), ()))
        if found != COLUMNS:
            raise ValueError(f"{path} must have the columns {COLUMNS}, got {found}. Name another file with --csv.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def environment(device: torch.device) -> dict[str, str | int]:
    """Return the columns that say where and when: date, versions, device."""
    return {
        "date": date.today().isoformat(),
        "lightning_actmem": _version("lightning-actmem"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    """Return the CPU's model, which Python's own `platform` does not know on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
