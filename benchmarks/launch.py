"""What packing a small tensor costs the host: everything in Python from `encode` or `decode` to the driver.

With a GPU the calls are real, and the time is that of the host without waiting for the device. Without one no kernel
runs: a launch goes through Triton's own `CompiledKernel`, whose last step, the launcher in C and the driver's call, is
replaced by nothing. Prints a line for each codec and writes benchmarks/launch.csv.

    python -m benchmarks.launch
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from lightning_actmem_kernels import CodecSpec, codec, decode, encode
from lightning_actmem_kernels.triton import launch

from .codecs import setting, tensor

CSV = Path(__file__).with_name("launch.csv")
SPECS = (
    CodecSpec("uniform", 4),
    CodecSpec("rotated", 2, centre=True),
    CodecSpec("relu", 4),
    CodecSpec("bfp", 4),
    CodecSpec("fp8_e4m3"),
    CodecSpec("fixed", 4),
    CodecSpec("mask"),
)
LIMIT_US = 6.0
CALLS, ROUNDS = 300, 60


class NoKernel:
    """A compiled kernel that is never run: `CompiledKernel` up to its launcher."""

    function = packed_metadata = None
    __getitem__ = CompiledKernel.__getitem__

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *arguments: Any) -> None:
        pass

    def run(self, *arguments: Any) -> None:
        pass


class NoDriver:
    """The two questions that a launch asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class AlwaysCompiled(dict[Any, Any]):
    """A table of compiled kernels that has every case, and looks it up like any other."""

    def get(self, case: Any, default: Any = None) -> Any:
        return super().get(case) or self.setdefault(case, NoKernel())


def microseconds(run: Callable[[], Any]) -> float:
    """Processor time of one call: the least of several rounds, since the machine has other work too."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            run()
        best = min(best, time.process_time() - start)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return round(best / CALLS * 1e6, 2)


def rows(numel: int, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per codec."""
    for spec in SPECS:
        x = tensor(spec.codec, dtype, numel, device)
        payload = encode(x, spec, key=1)
        restore = {"numel": numel, "dtype": x.dtype, "key": 1}
        yield {
            "codec": spec.label,
            "dtype": str(x.dtype).removeprefix("torch."),
            "numel": numel,
            "encode_us": microseconds(lambda x=x, spec=spec: encode(x, spec, key=1)),
            "decode_us": microseconds(lambda p=payload, spec=spec, kw=restore: decode(p, spec, **kw)),
            "driver": "real" if device.type == "cuda" else "left out",
        }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=4096)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if device.type == "cpu":
        driver.set_active(NoDriver())
        for target, name, value in ((codec, "_TRITON_DEVICES", ("cpu",)), (launch, "_compiled", AlwaysCompiled())):
            mock.patch.object(target, name, value).start()
    with CSV.open("w", newline="") as file:
        writer = None
        for row in rows(options.numel, torch.bfloat16, device):
            row |= setting(device) | {"path": "triton"}
            writer = writer or csv.DictWriter(file, row)
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
            print(f"{row['codec']:<12} encode {row['encode_us']:>5} us   decode {row['decode_us']:>5} us", flush=True)
    print(f"the aim is {LIMIT_US} us each; the driver's own part is {'in' if device.type == 'cuda' else 'not in'} it")


if __name__ == "__main__":
    main()
