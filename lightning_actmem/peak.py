"""How much memory a piece of training takes at its peak: by allocator or profiler exactly, or as the system sees it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType, _enable_record_function, _profiler_enabled
from torch.autograd.profiler import profile

from .errors import ActMemError
from .memory import address_space_left

_CLEAR_REFS = Path("/proc/self/clear_refs")
#: A block of this size, allocated and freed, divides the profiler's records; no tensor of numbers takes so many bytes.
_MARK_BYTES = 1_000_003


class PeakMeter:
    """Measures the largest number of bytes allocated at one time between entering and leaving this context.

    On a GPU it is the allocator's own count (``max_memory_allocated``) and covers everything on the device. On the CPU
    it is ``held`` and the running sum of all allocations and releases that torch's profiler reports: exact for
    tensors, and blind to what was allocated before.

    Args:
        device: The device.
        held: On the CPU, bytes allocated before that stay: weights, buffers, optimizer state.

    Attributes:
        peak_bytes: The peak, after leaving.
        moments: The peaks from the last `begin` to the next `mark`, from each `mark` to the next, and to the end;
            empty without a `begin`.

    Raises:
        ActMemError: On entering, if the device cannot be measured, or a profiler is running already.

    Example:
        >>> with PeakMeter(torch.device("cpu")) as meter:
        ...     for _ in range(3):
        ...         x = torch.ones(2**18)
        ...         del x
        >>> meter.peak_bytes
        1048576
    """

    def __init__(self, device: torch.device, held: int = 0) -> None:
        self.peak_bytes = 0
        self.moments: tuple[int, ...] = ()
        self._device = device
        self._held = held
        self._profiler: Any = None
        self._ended: list[int] = []  # on a GPU, the moments that are over
        self._marks = 0
        self._begin: int | None = None

    def __enter__(self) -> PeakMeter:
        if self._device.type != "cpu":
            self._allocator().reset_peak_memory_stats(self._device)
            return self
        if _profiler_enabled():
            raise ActMemError(
                "memory on the CPU is measured with torch's profiler, and one is running already. "
                "Leave it off for this run, for example Trainer(profiler=None)."
            )
        # Not torch.profiler.profile: it builds a tree of all events, which takes ten times as long as the step.
        self._profiler = profile(profile_memory=True)
        with _quiet():
            self._profiler.__enter__()
        # Memory is reported without the operations, whose records would take several times as much memory.
        _enable_record_function(False)
        return self

    def begin(self) -> None:
        """Begin the moments anew."""
        self.mark()
        self._begin = self._marks

    def mark(self) -> None:
        """End one moment and begin the next."""
        self._marks += 1
        if self._profiler is not None:
            torch.empty(_MARK_BYTES, dtype=torch.uint8)
            return
        self._ended.append(int(self._allocator().max_memory_allocated(self._device)))
        self._allocator().reset_peak_memory_stats(self._device)

    def __exit__(self, *exception: Any) -> None:
        peaks = self._ended if self._profiler is None else self._recorded(*exception)
        if self._profiler is None:
            peaks.append(int(self._allocator().max_memory_allocated(self._device)))
        self._profiler = None
        self.peak_bytes = max(peaks)
        self.moments = () if self._begin is None else tuple(peaks[self._begin :])

    def _recorded(self, *exception: Any) -> list[int]:
        """End the profiler, and return the peaks of all moments."""
        profiler = self._profiler
        _enable_record_function(True)
        with _quiet():
            profiler.__exit__(*exception)
        changes = sorted(
            (event.start_ns(), event.nbytes())
            for event in profiler.kineto_results.events()
            if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
        )
        peaks, held = [self._held], self._held
        for _, nbytes in changes:
            if nbytes == _MARK_BYTES:
                peaks.append(held)
            elif nbytes != -_MARK_BYTES:
                held += nbytes
                peaks[-1] = max(peaks[-1], held)
        return peaks

    def _allocator(self) -> Any:
        module = torch.get_device_module(self._device)
        if not (hasattr(module, "max_memory_allocated") and hasattr(module, "reset_peak_memory_stats")):
            raise ActMemError(
                f"{self._device.type} does not tell its peak memory. CUDA, ROCm, XPU and the CPU do; "
                "elsewhere use Lightning's BatchSizeFinder."
            )
        return module


class ResidentMeter:
    """Measures the peak of the process's resident memory between entering and leaving this context.

    It counts from when the meter was made, however often it is entered: what a library keeps for later and fragments of
    the heap are part of every peak after. It takes no memory itself, where `PeakMeter` needs up to 10 KiB for every
    allocation when it ends, and it sees what no tensor holds. Exact within some 0.5 MiB. Where the address space has a
    limit (``ulimit -v``), which counts what was never written to as well, its peak counts if it is a new one. Linux
    only.

    Args:
        held: Bytes allocated when the meter is made that count as well: weights, buffers, optimizer state.
    """

    def __init__(self, held: int = 0) -> None:
        self.peak_bytes = 0
        self._held = held
        self._first = _process_bytes()
        self._peak_before = 0

    @staticmethod
    def is_supported() -> bool:
        """Whether this system tells the peak, and lets it begin anew."""
        return os.access("/proc/self/clear_refs", os.W_OK) and os.access("/proc/self/status", os.R_OK)

    def __enter__(self) -> ResidentMeter:
        _CLEAR_REFS.write_text("5")  # the peak is what is resident now
        self._peak_before = _process_bytes()["VmPeak"]
        return self

    def __exit__(self, *exception: Any) -> None:
        first, after = self._first, _process_bytes()
        peak = after["VmHWM"] - first["VmRSS"]
        if address_space_left() is not None and after["VmPeak"] > self._peak_before:
            peak = max(peak, after["VmPeak"] - first["VmSize"])
        self.peak_bytes = self._held + max(0, peak)

    def resting_bytes(self) -> int:
        """Return what is resident now, above that at first, and what was held then."""
        return self._held + max(0, _process_bytes()["VmRSS"] - self._first["VmRSS"])


def _process_bytes() -> dict[str, int]:
    """What the system tells of this process: resident memory and address space, now and at their peaks."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines if "kB" in line)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler from reporting its start and stop on the console."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "6")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
