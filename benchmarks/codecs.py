"""Speed of every codec against a copy of the same bytes; writes rows to benchmarks/codecs.csv.

A row is one codec, width, dtype, size and direction: median and 20/80 quantiles of the time, and the rate in bytes of
the uncompressed tensor as a fraction of what a copy of that tensor reaches on the same device. The copy goes to memory
that was written before; a clone, to memory fresh from the system as decode's is, is reported beside it.

    python benchmarks/codecs.py                          # every codec, on the GPU if there is one
    python benchmarks/codecs.py --codecs uniform --bits 4 --dtypes float32 --mb 64 --paths eager compiled
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_actmem_kernels import CodecSpec, cpu_path, decode, encode, resolve_backend
from lightning_actmem_kernels.reference import compiled
from lightning_actmem_kernels.spec import WIDTHS

CSV = Path(__file__).with_name("codecs.csv")
CODECS = ("uniform", "rotated", "relu", "bfp", "fp8_e4m3", "fp8_e5m2", "mask")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
QUANTILES = {"low_ms": 0.2, "median_ms": 0.5, "high_ms": 0.8}
MIN_SECONDS, MIN_RUNS = 0.2, 5


def times_s(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, after two that warm up; in turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for warm in range(2 + 1000):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if warm >= 2:
                times[name].append(time.perf_counter() - start)
        if warm >= 1 + MIN_RUNS and min(map(sum, times.values())) > MIN_SECONDS:
            break
    return times


def quantiles_ms(times: list[float]) -> dict[str, float]:
    """The quantiles of QUANTILES, in milliseconds."""
    ordered = torch.tensor(times, dtype=torch.float64) * 1e3
    return {name: round(float(ordered.quantile(q)), 4) for name, q in QUANTILES.items()}


def tensor(codec: str, dtype: torch.dtype, numel: int, device: torch.device) -> torch.Tensor:
    """What the codec is made for."""
    x = torch.randn(numel, device=device)
    return x > 0 if codec == "mask" else (x.relu() if codec == "relu" else x).to(dtype)


def rows(spec: CodecSpec, dtype: torch.dtype, megabytes: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Both directions of one codec beside a copy."""
    itemsize = 1 if spec.codec == "mask" else dtype.itemsize
    x = tensor(spec.codec, dtype, megabytes * 2**20 // itemsize, device)
    target, payload = torch.empty_like(x), encode(x, spec, key=1)
    restore = {"numel": x.numel(), "dtype": x.dtype, "key": 1}
    runs: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(x),
        "clone": x.clone,
        "encode": lambda: encode(x, spec, key=1),
        "decode": lambda: decode(payload, spec, **restore),
    }
    found = {name: quantiles_ms(times) for name, times in times_s(runs, device).items()}
    copy_ms, clone_ms = found["copy"]["median_ms"], found["clone"]["median_ms"]
    for direction in ("encode", "decode"):
        measured = found[direction]
        yield {
            "codec": spec.codec,
            "bits": spec.bits,
            "dtype": str(x.dtype).removeprefix("torch."),
            "mb": megabytes,
            "direction": direction,
            **measured,
            "gb_per_s": round(x.nbytes / measured["median_ms"] / 1e6, 2),
            "copy_gb_per_s": round(x.nbytes / copy_ms / 1e6, 2),
            "clone_gb_per_s": round(x.nbytes / clone_ms / 1e6, 2),
            "fraction_of_copy": round(copy_ms / measured["median_ms"], 3),
            "fraction_of_clone": round(clone_ms / measured["median_ms"], 3),
        }


def setting(device: torch.device) -> dict[str, Any]:
    """Device, versions and date."""
    gpu = device.type == "cuda"
    triton = __import__("triton").__version__ if find_spec("triton") else ""
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU {platform.machine()}",
        "threads": "" if gpu else torch.get_num_threads(),
        "path": resolve_backend(None, device) if gpu else cpu_path().split(":")[0],
        "torch": torch.__version__,
        "triton": triton if gpu else "",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=CODECS)
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3, 4, 8])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--mb", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--paths", nargs="+", choices=["eager", "compiled"], default=["eager"], help="on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--append", action="store_true", help="add to the CSV instead of replacing it")
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    options = arguments()
    device = torch.device(options.device)
    never, written = compiled.AFTER_ELEMENTS, CSV.exists() and options.append
    with CSV.open("a" if written else "w", newline="") as file:
        writer = None
        for path in options.paths:
            compiled.AFTER_ELEMENTS = 0 if path == "compiled" else never * 1000
            for codec in options.codecs:
                for bits in sorted(set(options.bits) & set(WIDTHS[codec])):
                    for dtype in options.dtypes if codec != "mask" else options.dtypes[:1]:
                        for megabytes in options.mb:
                            for row in rows(CodecSpec(codec, bits), DTYPES[dtype], megabytes, device):
                                row |= setting(device)
                                writer = writer or csv.DictWriter(file, row)
                                if not written:
                                    writer.writeheader()
                                    written = True
                                writer.writerow(row)
                                file.flush()
                                print(*row.values())


if __name__ == "__main__":
    main()
