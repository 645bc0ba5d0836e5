"""The peak meter, held against allocations that can be counted by hand and against the ledger."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest
import torch
from torch.profiler import profile

from lightning_actmem import ActMemEngine, ActMemError, peak
from lightning_actmem.peak import PeakMeter, ResidentMeter
from tests.models import mlp

CPU = torch.device("cpu")
MIB = 2**20
ONE_PERCENT = 0.01


def mebibytes(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_the_largest_sum_at_one_time():
    with PeakMeter(CPU, held=5) as meter:
        first = mebibytes(3)
        second = mebibytes(4)
        del first
        third = mebibytes(2)
        del second, third
    assert meter.peak_bytes == 7 * MIB + 5


def test_what_dies_before_does_not_count():
    before = mebibytes(9)
    with PeakMeter(CPU) as meter:
        del before
        mebibytes(1)
    assert meter.peak_bytes == MIB


def test_the_moments_since_the_last_beginning():
    with PeakMeter(CPU, held=5) as meter:
        meter.begin()
        mebibytes(9)
        meter.begin()
        kept = mebibytes(2)
        mebibytes(4)
        meter.mark()
        meter.mark()
        mebibytes(1)
        del kept
        meter.mark()
    assert meter.moments == (6 * MIB + 5, 2 * MIB + 5, 3 * MIB + 5, 5)
    assert meter.peak_bytes == 9 * MIB + 5


def test_without_a_beginning_there_are_no_moments():
    with PeakMeter(CPU) as meter:
        mebibytes(1)
    assert meter.moments == ()


def test_a_profiler_that_runs_already_is_told():
    with profile(), pytest.raises(ActMemError, match="one is running already"), PeakMeter(CPU):
        pass


QUIETLY = """
import os
import torch
from lightning_actmem import peak
from lightning_actmem.peak import PeakMeter, ResidentMeter
before = dict(os.environ)
with PeakMeter(torch.device("cpu")):
    torch.empty(1 << 20)
assert dict(os.environ) == before
"""


def test_nothing_is_printed_and_the_environment_stays():
    """In a new process: the profiler reads how much it may say once, at its first use."""
    result = subprocess.run([sys.executable, "-c", QUIETLY], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_the_ledger_says_what_stays_allocated_after_the_forward_pass(bits):
    """Bytes that live when the forward pass is over: the ledger's stored bytes and the profiler's sum within 1 %."""
    model = mlp(width=128, depth=3)
    x = torch.randn(1024, 128)
    engine = ActMemEngine(bits=bits)
    with engine.compress(model, inputs=x):
        model(x).square().mean().backward()  # code that is loaded at its first use
    torch.manual_seed(0)
    after = _Allocated()
    with after, engine.compress(model, inputs=x):
        loss = model(x).square().mean()
    stored = engine.ledger.live_saved_bytes
    assert stored > MIB / 4
    assert abs(after.bytes - stored) <= ONE_PERCENT * stored
    del loss


class _Allocated:
    """What is allocated inside this context and still alive at its end, by torch's profiler."""

    def __enter__(self) -> _Allocated:
        self.profiler = torch.autograd.profiler.profile(profile_memory=True)
        self.profiler.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.profiler.__exit__(*exception)
        events = self.profiler.kineto_results.events()
        self.bytes = sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.skipif(not ResidentMeter.is_supported(), reason="this system does not tell the peak of resident memory")
class TestResidentMeter:
    """Some pages more or less: kernels count them processor by processor.

    With memory mapped for the occasion. A tensor of any size may go into a hole of the heap that other tests have left,
    and stays resident there when it is freed: now and then that failed.
    """

    SLACK = 2 * MIB

    @staticmethod
    def mapped(count: int) -> torch.Tensor:
        return torch.frombuffer(mmap.mmap(-1, count * MIB), dtype=torch.uint8).fill_(1)

    def test_the_largest_sum_at_one_time(self):
        with ResidentMeter(held=5) as meter:
            first = self.mapped(100)
            del first
            second = self.mapped(60)
        assert abs(meter.peak_bytes - 100 * MIB - 5) <= self.SLACK
        del second

    def test_it_counts_from_when_it_was_made(self):
        before = self.mapped(100)
        meter = ResidentMeter(held=5)
        kept = self.mapped(40)
        with meter:
            self.mapped(50)
        assert abs(meter.peak_bytes - 90 * MIB - 5) <= self.SLACK
        assert abs(meter.resting_bytes() - 40 * MIB - 5) <= self.SLACK
        del kept
        with meter:
            self.mapped(60)
        assert abs(meter.peak_bytes - 60 * MIB - 5) <= self.SLACK
        del before

    def test_what_is_never_written_to_counts_only_where_the_address_space_has_a_limit(self, monkeypatch):
        peaks = []
        for left in (1 << 40, None):
            monkeypatch.setattr(peak, "address_space_left", lambda left=left: left)
            with ResidentMeter() as meter:
                empty = mebibytes(4096)  # more than the process has had so far
            peaks.append(meter.peak_bytes)
            del empty
        assert peaks[0] >= 1024 * MIB
        assert peaks[1] <= self.SLACK


def test_operations_are_recorded_again_after_it():
    with PeakMeter(CPU):
        pass
    with profile() as profiler:
        mebibytes(1).fill_(1)
    assert any(event.key == "aten::fill_" for event in profiler.key_averages())
