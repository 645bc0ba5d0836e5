"""Device memory: how much there is, how a count is written, and how its end is told by every allocator."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ActMemError

#: What allocators and libraries say when memory is short; lower case.
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP, MPS, XPU ("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY" is below), cuFFT, NCCL
    "out_of_memory",
    "out_of_device_memory",
    "out_of_host_memory",
    "out_of_resources",  # Level Zero and Unified Runtime (XPU)
    "can't allocate memory",  # PyTorch's CPU allocator
    "cannot allocate memory",  # errno 12
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, which allocates its scratchpad and its code by itself
    "could not create a memory",
    "could not initialize a memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_not_supported",  # cuDNN finds no algorithm whose workspace fits
    "cusolver_status_alloc_failed",
    "cusparse_status_alloc_failed",
    "hipblas_status_alloc_failed",
    "rocblas_status_memory_error",
    "miopenstatusallocfailed",
)

#: From this size on freed memory goes back at once: what glibc begins with.
_RETURNED_BYTES = 128 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def human_bytes(count: int) -> str:
    """Return a byte count in a unit of 1024 with one decimal, or exactly below 1 KiB.

    Example:
        >>> human_bytes(1000), human_bytes(1536), human_bytes(3 * 2**20)
        ('1000 B', '1.5 KiB', '3.0 MiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory is short: CUDA, HIP, XPU, MPS, oneDNN, CPU.

    Example:
        >>> is_out_of_memory(RuntimeError("std::bad_alloc")), is_out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_failed(error: BaseException) -> None:
    """Let go of what a failed step held: the locals of all its frames, and what allocators keep for later."""
    seen: set[int] = set()
    chained: BaseException | None = error
    while chained is not None and id(chained) not in seen:
        seen.add(id(chained))
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__
    collect()


def collect() -> None:
    """Collect garbage, and give back to the device what allocators keep for later."""
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.xpu.is_available() and torch.xpu.is_initialized():
        torch.xpu.empty_cache()


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    """Glibc's way to give freed memory back to the system: else it counts as used where memory runs out."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def return_freed_memory() -> bool:
    """Have glibc give freed tensors back to the system at once, in this process from now on.

    By itself it takes every freed tensor of up to 32 MiB for a reason to keep the next one of that size, and what it
    keeps falls into fragments, so that a process may grow for hundreds of steps. Steps take longer for it, those of
    small layers several times as long.

    Returns:
        Whether it does: not where the environment has ``MALLOC_MMAP_THRESHOLD_``, nor with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _RETURNED_BYTES))


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of the storages behind tensors, each storage once; other objects count nothing."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def held_bytes(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> int:
    """Return the bytes that stay between steps: parameters, buffers and the optimizers' state, without gradients."""
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return tensor_bytes([*module.parameters(), *module.buffers(), *states])


def available_bytes(device: torch.device, held: int = 0) -> int:
    """Return the bytes that training may take on a device, with what it holds already.

    On a GPU this is what the driver has free and what PyTorch's allocator has of it. On the CPU it is ``held`` and the
    least that the address-space limit (``ulimit -v``), the control group and the machine leave.

    Args:
        device: The device.
        held: On the CPU, what the model and its optimizers hold already; on a GPU the allocator knows.

    Returns:
        Bytes.

    Raises:
        ActMemError: If the device does not tell.
    """
    if device.type == "cpu":
        left = [
            bytes_left for bytes_left in (address_space_left(), _control_group(), _machine()) if bytes_left is not None
        ]
        if not left:
            raise ActMemError("this system does not tell how much memory is left. Give a budget such as '4GiB'.")
        return held + max(0, min(left))
    module = torch.get_device_module(device)
    if not (hasattr(module, "mem_get_info") and hasattr(module, "memory_reserved")):
        raise ActMemError(f"{device.type} does not tell how much memory is left. Give a budget such as '4GiB'.")
    free, _ = module.mem_get_info(device)
    return int(free) + int(module.memory_reserved(device))


def address_space_left() -> int | None:
    """Return the bytes that the address-space limit (``ulimit -v``) leaves, or ``None`` where there is none."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit - pages * resource.getpagesize()


def _control_group() -> int | None:
    folder = Path(os.environ.get("CGROUP_ROOT", "/sys/fs/cgroup"))
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
