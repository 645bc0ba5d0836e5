"""Peak memory and time of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from lightning_actmem.peak import PeakMeter

from .methods import Method
from .models import Workload

WARMUP_ROUNDS = 2

Clock = Callable[[], float]


def peak_bytes(work: Workload, method: Method) -> int:
    """Return the largest number of bytes allocated in a step above what is there before it.

    On a GPU by the allocator's own count, on the CPU as the running sum of all allocations and releases that the
    profiler sees. Run a step before: the gradients have to be there.

    Args:
        work: What is measured.
        method: How it is stored.

    Returns:
        Bytes on the model's device.
    """
    _synchronize(work)
    before = torch.cuda.memory_allocated() if work.device.type == "cuda" else 0
    with PeakMeter(work.device) as meter:
        method.step(work)
        _synchronize(work)
    return meter.peak_bytes - before


def step_seconds(work: Workload, method: Method, clock: Clock = time.perf_counter) -> float:
    """Return the time of one step."""
    _synchronize(work)
    start = clock()
    method.step(work)
    _synchronize(work)
    return clock() - start


def interleaved_seconds(
    work: Workload, methods: Sequence[Method], repeats: int, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Time the methods in turn (A B C A B C ...), so that a slow moment of the machine meets all of them.

    Args:
        work: What is measured.
        methods: The methods.
        repeats: Steps per method after two rounds of warming up.
        clock: Tells the seconds: wall time, or `time.process_time` for what the processor spends on this process alone.

    Returns:
        For every method its step times in seconds.
    """
    rounds = [[step_seconds(work, method, clock) for method in methods] for _ in range(WARMUP_ROUNDS + repeats)]
    return [list(times) for times in zip(*rounds[WARMUP_ROUNDS:], strict=True)]


def quantiles_20_50_80(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20 %, 50 % and 80 % quantiles, interpolated."""
    low, median, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    )
    return low, median, high


def _synchronize(work: Workload) -> None:
    if work.device.type == "cuda":
        torch.cuda.synchronize()
