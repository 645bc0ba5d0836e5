"""Memory for decoded tensors: advice to the system changes nothing but speed, and may be refused or not exist."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_actmem_kernels.reference import memory

CPU = torch.device("cpu")
LARGE = memory.HUGE_FROM_BYTES // 4 + 1001


@pytest.mark.parametrize("numel", [0, 1, LARGE])
def test_a_tensor_to_be_written(numel):
    t = memory.empty(numel, torch.float32, CPU)
    assert t.shape == (numel,)
    assert t.dtype == torch.float32
    assert bool((t.fill_(2.0) == 2.0).all())


def test_only_whole_pages_of_large_tensors_are_advised(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *args: asked.append([getattr(a, "value", a) for a in args]))
    memory.empty(1000, torch.float32, CPU)
    assert not asked
    t = memory.empty(LARGE, torch.float32, CPU)
    ((start, length, advice),) = asked
    assert advice == memory.MADV_HUGEPAGE
    assert start % memory.HUGE_PAGE == length % memory.HUGE_PAGE == 0
    assert t.data_ptr() <= start < start + length <= t.data_ptr() + t.nbytes
    assert length >= t.nbytes - 2 * memory.HUGE_PAGE


def test_a_system_without_the_advice(monkeypatch):
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.empty(LARGE, torch.float32, CPU).numel() == LARGE


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
def test_the_advice_is_found_on_linux():
    assert memory._madvise() is not None
