"""The wordings of out of memory, and what is left on a device."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref

import pytest
import torch

from lightning_actmem import ActMemError, memory
from lightning_actmem.memory import available_bytes, free_failed, held_bytes, is_out_of_memory, return_freed_memory

CPU = torch.device("cpu")

WORDINGS = [
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("XPU out of memory. Tried to allocate 1.00 GiB"),
    RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]
OTHERS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x")]


@pytest.mark.parametrize("error", WORDINGS, ids=lambda error: str(error)[:30])
def test_out_of_memory_in_every_wording(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def test_the_cause_counts():
    error = RuntimeError("training_step failed")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


def test_a_failed_step_lets_go_of_its_tensors():
    held = []

    def step():
        big = torch.ones(10)
        held.append(weakref.ref(big))
        raise RuntimeError("out of memory")

    gc.disable()
    try:
        try:
            step()
        except RuntimeError as error:
            free_failed(error)
            assert held[0]() is None
    finally:
        gc.enable()


def test_held_bytes_counts_a_tied_weight_once_and_the_optimizers_state():
    first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    assert held_bytes(model, [optimizer]) == 4 * 64
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert held_bytes(model, [optimizer]) == 2 * 4 * 64


def test_the_least_of_all_limits_is_available(monkeypatch):
    monkeypatch.setattr(memory, "address_space_left", lambda: 500)
    monkeypatch.setattr(memory, "_control_group", lambda: None)
    monkeypatch.setattr(memory, "_machine", lambda: 900)
    assert available_bytes(CPU, held=70) == 570
    monkeypatch.setattr(memory, "address_space_left", lambda: -5)
    assert available_bytes(CPU, held=70) == 70


def test_a_system_that_does_not_tell(monkeypatch):
    for name in ("address_space_left", "_control_group", "_machine"):
        monkeypatch.setattr(memory, name, lambda: None)
    with pytest.raises(ActMemError, match="Give a budget such as '4GiB'"):
        available_bytes(CPU)


def test_a_control_group_is_a_limit(monkeypatch, tmp_path):
    monkeypatch.setenv("CGROUP_ROOT", str(tmp_path))
    assert memory._control_group() is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert memory._control_group() is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._control_group() == 900


FREED = """
import torch
from lightning_actmem.memory import return_freed_memory
from lightning_actmem_kernels.reference.memory import keep_heap

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

torch.set_num_threads(1)  # another has a heap of its own
keep_heap()
print(return_freed_memory())
before = address_space()
blocks = [torch.ones(1 << 18) for _ in range(64)]
last = torch.ones(1 << 18)
del blocks
print((address_space() - before) // 2**20)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc has these settings"
)
@pytest.mark.parametrize(("environment", "answer"), [({}, "True"), ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, "False")])
def test_freed_tensors_go_back_at_once_unless_the_environment_says_otherwise(environment, answer):
    """64 MiB of tensors below one that lives on; by itself the heap keeps them."""
    result = subprocess.run(
        [sys.executable, "-c", FREED],
        env={"PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, kept = result.stdout.split()
    assert said == answer
    assert (int(kept) < 8) == (answer == "True")


def test_another_c_library_has_no_such_settings(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert not return_freed_memory()
