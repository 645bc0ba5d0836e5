"""Reuse of compiled kernels: when it happens, what they are given, and what goes to the launcher of Triton instead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from lightning_actmem_kernels.triton import launch as module
from lightning_actmem_kernels.triton.launch import Case, as_it_is

DEVICE = -1  # of a tensor on the CPU
HANDLES = (None, None, None)  # metadata and hooks: nobody asked


class Stub:
    """A kernel whose launches are written down, and the compiled kernel that it returns."""

    def __init__(self, refuses=False):
        self.generic, self.direct, self.by_compiled, self.refuses = [], [], [], refuses

    def __getitem__(self, grid):
        def run(*args, **options):
            self.generic.append((grid, args, options))
            return Compiled(self)

        return run


class Compiled:
    function, packed_metadata = "function", "packed"

    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, *args):
        if self.kernel.refuses:
            raise TypeError("function takes exactly 9 arguments (12 given)")
        self.kernel.direct.append(args)

    def __getitem__(self, grid):
        def run(*args):
            self.kernel.by_compiled.append((grid, args))

        return run


@pytest.fixture(autouse=True)
def reusable(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: DEVICE, get_current_stream=lambda device: 7)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(module, "_HOOKS", SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None))
    monkeypatch.setattr(module, "_TRITON", module._LAST_KNOWN)
    monkeypatch.setattr(module, "_reusable", lambda flat: True)


def _case(kernel, constants=(4, 256)):
    return Case(kernel, constants, (as_it_is, as_it_is), DEVICE)


def test_the_second_launch_is_direct():
    kernel, x, y = Stub(), torch.zeros(64), torch.zeros(64)
    case = _case(kernel)
    case.launch(3, (x, y), (64, -5))
    case.launch(7, (x, y), (16, 1))
    assert kernel.generic == [((3,), (x, y, 64, -5, 4, 256), {"enable_fp_fusion": False})]
    assert kernel.direct == [(7, 1, 1, 7, "function", "packed", *HANDLES, x.data_ptr(), y.data_ptr(), 16, 1, 4, 256)]


@pytest.mark.parametrize("place", [0, 1])
def test_pointers_that_are_not_aligned_never_reuse(place):
    kernel, tensors = Stub(), [torch.zeros(64), torch.zeros(64)]
    case = _case(kernel)
    case.launch(1, tuple(tensors), ())
    tensors[place] = tensors[place][1:]
    for _ in range(2):
        case.launch(1, tuple(tensors), ())
    assert len(kernel.generic) == 3
    assert not kernel.direct


def test_what_was_compiled_for_unaligned_pointers_is_not_kept():
    kernel, x, y = Stub(), torch.zeros(64), torch.zeros(64)
    case = _case(kernel)
    case.launch(1, (x[1:], y), ())
    case.launch(1, (x, y), ())
    assert len(kernel.generic) == 2


def test_a_tensor_on_another_device_is_for_triton_to_refuse():
    kernel, x = Stub(), torch.zeros(64)
    case = Case(kernel, (), (as_it_is, as_it_is), DEVICE - 1)
    for _ in range(2):
        case.launch(1, (x, x), ())
    assert len(kernel.generic) == 2


def test_a_launch_makes_its_device_current(monkeypatch):
    kernel, x, current = Stub(), torch.zeros(64), []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(module.driver.active, "get_current_device", lambda: current[-1] if current else 5)
    case = _case(kernel)
    for _ in range(2):
        case.launch(1, (x, x), ())
    assert (len(kernel.generic), len(kernel.direct), current) == (1, 1, [])


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_is_called_by_what_triton_compiled(name, monkeypatch):
    kernel, x = Stub(), torch.zeros(64)
    case, chain = _case(kernel), SimpleNamespace(calls=[])
    case.launch(1, (x, x), ())
    for hook in (None, chain):
        monkeypatch.setattr(module._HOOKS, name, hook)
        case.launch(1, (x, x), ())
    assert (len(kernel.direct), len(kernel.by_compiled)) == (2, 0)
    chain.calls.append(print)
    for hook in (print, chain):
        monkeypatch.setattr(module._HOOKS, name, hook)
        case.launch(2, (x, x), (9,))
    assert len(kernel.direct) == 2
    assert kernel.by_compiled == [((2, 1, 1), (x.data_ptr(), x.data_ptr(), 9, 4, 256))] * 2


def test_the_hooks_are_tritons_own(monkeypatch):
    monkeypatch.undo()
    assert not module._hooked()
    previous = module._HOOKS.launch_enter_hook
    if previous is None:
        monkeypatch.setattr(module._HOOKS, "launch_enter_hook", print)
    else:
        monkeypatch.setattr(previous, "calls", [print])
    assert module._hooked()


def test_a_triton_that_is_not_known_launches_what_it_compiled(monkeypatch):
    monkeypatch.setattr(module, "_TRITON", (99, 0))
    kernel, x = Stub(), torch.zeros(64)
    case = _case(kernel)
    for _ in range(2):
        case.launch(1, (x, x), ())
    assert (len(kernel.generic), len(kernel.direct), len(kernel.by_compiled)) == (1, 0, 1)


def test_a_launcher_with_other_arguments_is_asked_once():
    kernel, x, y = Stub(refuses=True), torch.zeros(64), torch.zeros(64)
    case = _case(kernel)
    for _ in range(4):
        case.launch(1, (x, y), ())
    assert len(kernel.generic) == 4
    kernel.refuses = False
    case.launch(1, (x, y), ())
    assert not kernel.direct


def test_nothing_is_kept_where_a_case_says_too_little(monkeypatch):
    monkeypatch.undo()
    kernel, x, y = Stub(), torch.zeros(64), torch.zeros(64)
    case = _case(kernel)
    for _ in range(2):
        case.launch(1, (x, y), ())  # on the CPU: the interpreter
    assert len(kernel.generic) == 2
