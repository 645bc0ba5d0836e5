"""What packing a small tensor costs the host: everything in Python from `encode` or `decode` to the driver.

With a GPU the calls are real, and the time is that of the host without waiting for the device. Without one no kernel
runs: a launch goes through all that PyTorch and Triton for NVIDIA do in Python, and its last step, Triton's launcher in
C with the driver's call, is replaced by nothing. Allocations are then those of the CPU.

Beside the time stand the bytes that packing saves of what CUDA's allocator hands out. Prints a line for each codec and
size and writes benchmarks/launch.csv.

    python -m benchmarks.launch
    python -m benchmarks.launch --numel 4096
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from lightning_actmem_kernels import CodecSpec, codec, decode, encode
from lightning_actmem_kernels.triton import launch, mask, tiles

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
CALLS, ROUNDS = 100, 300
CUDA_UNIT_BYTES = 512  # what PyTorch's allocator for CUDA rounds every tensor up to


class NoLaunch(CudaLauncher):
    """Triton's launcher up to its last step."""

    def __init__(self) -> None:
        pass

    def __getattr__(self, name: str) -> int:
        setattr(self, name, 0)  # sizes of scratch memory, flags: none
        return 0

    def launch(self, *arguments: Any) -> None:
        pass


class NoKernel(CompiledKernel):
    """A compiled kernel that has been loaded and does nothing."""

    def __init__(self) -> None:
        launcher = NoLaunch()
        # Where the launcher is depends on the version of Triton.
        vars(self).update(
            module=0, function=0, packed_metadata=(4, 1, 0), run=launcher, _run=launcher, src=None, name=""
        )


class NoDriver:
    """The two questions that a launch asks: as Triton's driver for CUDA, of a device that is the CPU."""

    get_current_device = staticmethod(torch.cuda.current_device)

    def get_current_stream(self, device: int) -> int:
        return 0


def no_device() -> int:
    """Index of the device of tensors on the CPU."""
    return -1


def backend_as_on_a_gpu(x: torch.Tensor, backend: str | None) -> str:
    """What the codecs ask of a tensor to find its backend, with the answer of one on a GPU."""
    if backend is not None:
        return backend
    return "triton" if not (x.is_cuda or x.is_xpu) and codec._TRITON_INSTALLED else "torch"


def keep_no_kernel(case: launch.Case, *arguments: Any) -> None:
    """What the first launch of a case comes to."""
    case._keep(NoKernel())


@contextmanager
def no_gpu() -> Iterator[None]:
    """Take tensors on the CPU for ones on a GPU, up to what would launch a kernel."""
    patches = (
        mock.patch.object(torch.cuda, "_initialized", True),
        mock.patch.object(torch._C, "_cuda_getDevice", no_device, create=True),
        mock.patch.object(driver, "_active" if hasattr(driver, "_active") else "active", NoDriver()),
        mock.patch.object(codec, "_backend_for", backend_as_on_a_gpu),
        mock.patch.object(launch.Case, "_launch_by_triton", keep_no_kernel),
    )
    with ExitStack() as stack:
        for cached in (launch.case_of, tiles._launches, mask._launch):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        for patch in patches:
            stack.enter_context(patch)
        yield


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


def cuda_bytes(*tensors: torch.Tensor) -> int:
    """What CUDA's allocator hands out for them."""
    return sum(-(-t.nbytes // CUDA_UNIT_BYTES) * CUDA_UNIT_BYTES for t in tensors)


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
            "cuda_bytes": cuda_bytes(x),
            "packed_cuda_bytes": cuda_bytes(*payload),
            **setting(device),
            "path": "triton",
            "triton": triton.__version__,  # also where no GPU is: its Python is what runs
        }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--csv", type=Path, default=CSV)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    with nullcontext() if device.type == "cuda" else no_gpu(), options.csv.open("w", newline="") as file:
        writer = None
        for numel in options.numel:
            for row in rows(numel, torch.bfloat16, device):
                writer = writer or csv.DictWriter(file, row)
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
                print(
                    f"{row['codec']:<12}{numel:>6} elements  encode {row['encode_us']:>5} us  decode"
                    f" {row['decode_us']:>5} us  {row['cuda_bytes']:>5} to {row['packed_cuda_bytes']:>5} bytes",
                    flush=True,
                )
    print(f"the aim is {LIMIT_US} us each; the driver's own part is {'in' if device.type == 'cuda' else 'not in'} it")


if __name__ == "__main__":
    main()
