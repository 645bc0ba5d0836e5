"""Speed of every codec against a copy of the same bytes; writes rows to benchmarks/codecs.csv.

A row is one codec, width, dtype, size and direction: median and 20/80 quantiles of the time, and the rate in bytes of
the uncompressed tensor as a fraction of what a copy of that tensor reaches on the same device. The copy goes to memory
that was written before; a clone, to memory fresh from the system as decode's is, is reported beside it. `model_ms` is
what an H100 should take (`kernel_model.py`). Where `--device cuda` finds no GPU, its rows say so; none is written.

    python -m benchmarks.codecs                          # every codec, on the GPU if there is one
    python -m benchmarks.codecs --sweep                  # sizes from 256 elements to 256 MB
    python -m benchmarks.codecs --codecs uniform --bits 4 --dtypes float32 --mb 64 --paths eager compiled
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

from .kernel_model import predicted_copy_ms, predicted_ms

CSV = Path(__file__).with_name("codecs.csv")
CODECS = tuple(codec for codec in WIDTHS if codec != "identity")
FLOATS = ("float32", "bfloat16", "float16")
OWN_DTYPE = {"mask": "bool", "integer": "int64"}
QUANTILES = {"low_ms": 0.2, "median_ms": 0.5, "high_ms": 0.8}
MIN_SECONDS, MIN_RUNS = 0.2, 5
MB = 2**20
SMALLEST, LARGEST_BYTES, FACTOR = 256, 256 * MB, 4  # of a sweep
UNMEASURED = "not yet measured"


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one run: on a GPU between two events, so that neither the launch nor the waiting counts."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def times_s(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, after two that warm up; in turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for warm in range(2 + 1000):
        for name, run in runs.items():
            taken = seconds(run, device)
            if warm >= 2:
                times[name].append(taken)
        if warm >= 1 + MIN_RUNS and min(map(sum, times.values())) > MIN_SECONDS:
            break
    return times


def quantiles_ms(times: list[float]) -> dict[str, float]:
    """The quantiles of QUANTILES, in milliseconds."""
    ordered = torch.tensor(times, dtype=torch.float64) * 1e3
    return {name: round(float(ordered.quantile(q)), 4) for name, q in QUANTILES.items()}


def tensor(codec: str, dtype: torch.dtype, numel: int, device: torch.device) -> torch.Tensor:
    """What the codec is made for."""
    if codec == "integer":
        return torch.randint(16, (numel,), device=device)
    x = torch.randn(numel, device=device)
    if codec == "mask":
        return x > 0
    return {"relu": x.relu(), "two_valued": (x > 0) * 1.25, "fixed": x.clamp(-4, 4)}.get(codec, x).to(dtype)


def rows(spec: CodecSpec, dtype: str, numel: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Both directions of one codec beside a copy."""
    x = tensor(spec.codec, getattr(torch, dtype), numel, device)
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
            **named(spec, dtype, numel, direction),
            **measured,
            "gb_per_s": round(x.nbytes / measured["median_ms"] / 1e6, 2),
            "copy_gb_per_s": round(x.nbytes / copy_ms / 1e6, 2),
            "clone_gb_per_s": round(x.nbytes / clone_ms / 1e6, 2),
            "fraction_of_copy": round(copy_ms / measured["median_ms"], 3),
            "fraction_of_clone": round(clone_ms / measured["median_ms"], 3),
        }


def named(spec: CodecSpec, dtype: str, numel: int, direction: str) -> dict[str, Any]:
    """The columns that say what a row is about."""
    return {"codec": spec.codec, "bits": spec.bits, "dtype": dtype, "elements": numel, "direction": direction}


def model(spec: CodecSpec, dtype: str, numel: int, direction: str) -> dict[str, Any]:
    """The columns that say what an H100 should take; empty without Triton."""
    if not find_spec("triton"):
        return {"model_ms": "", "model_fraction_of_copy": ""}
    time_ms = predicted_ms(spec, dtype, numel, direction)
    copy_ms = predicted_copy_ms(numel * getattr(torch, dtype).itemsize)
    return {"model_ms": float(f"{time_ms:.3g}"), "model_fraction_of_copy": round(copy_ms / time_ms, 2)}


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
    parser.add_argument("--bits", nargs="+", type=int, default=sorted(set().union(*WIDTHS.values())))
    parser.add_argument("--dtypes", nargs="+", choices=FLOATS, default=FLOATS)
    parser.add_argument("--mb", nargs="+", type=float, default=[1.0, 64.0, 256.0])
    parser.add_argument("--sweep", action="store_true", help="256 elements to 256 MB in steps of 4, instead of --mb")
    parser.add_argument("--paths", nargs="+", choices=["eager", "compiled"], default=["eager"], help="on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--append", action="store_true", help="add to the CSV instead of replacing it")
    return parser.parse_args()


def sizes(options: argparse.Namespace, itemsize: int) -> Iterator[int]:
    """Elements of the tensors to measure."""
    if not options.sweep:
        yield from (int(megabytes * MB) // itemsize for megabytes in options.mb)
        return
    numel = SMALLEST
    while numel * itemsize < LARGEST_BYTES:
        yield numel
        numel *= FACTOR
    yield LARGEST_BYTES // itemsize


def cases(options: argparse.Namespace) -> Iterator[tuple[CodecSpec, str, int]]:
    """Codec, dtype and elements of what is to be measured."""
    for codec in options.codecs:
        for bits in sorted(set(options.bits) & set(WIDTHS[codec])):
            for dtype in [OWN_DTYPE[codec]] if codec in OWN_DTYPE else options.dtypes:
                low, high = (-4.0, 4.0) if codec == "fixed" else (0.0, 1.0)
                for numel in sizes(options, getattr(torch, dtype).itemsize):
                    yield CodecSpec(codec, bits, centre=codec == "rotated", low=low, high=high), dtype, numel


def unmeasured(options: argparse.Namespace) -> None:
    """Print what the model says, and that nothing has been measured."""
    for spec, dtype, numel in cases(options):
        for direction in ("encode", "decode"):
            row = {**named(spec, dtype, numel, direction), "median_ms": UNMEASURED}
            print(*(row | model(spec, dtype, numel, direction)).values(), flush=True)


def main() -> None:
    """Measure and write."""
    options = arguments()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        unmeasured(options)
        return
    never, written = compiled.AFTER_ELEMENTS, CSV.exists() and options.append
    with CSV.open("a" if written else "w", newline="") as file:
        writer = None
        for path in sorted(options.paths, reverse=True):  # "eager" first: what has been compiled stays
            compiled.AFTER_ELEMENTS = 0 if path == "compiled" else never * 1000
            for spec, dtype, numel in cases(options):
                for row in rows(spec, dtype, numel, device):
                    row |= model(spec, dtype, numel, row["direction"]) | setting(device)
                    writer = writer or csv.DictWriter(file, row)
                    if not written:
                        writer.writeheader()
                        written = True
                    writer.writerow(row)
                    file.flush()
                    print(*row.values())


if __name__ == "__main__":
    main()
