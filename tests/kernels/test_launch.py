"""Reuse of compiled kernels: when it happens, what they are given, and what goes to the launcher of Triton instead."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lightning_actmem_kernels.triton import launch as module
from lightning_actmem_kernels.triton.launch import launch


class Stub:
    """A kernel whose launches are written down, and the compiled kernel that it returns."""

    def __init__(self, refuses=False):
        self.generic, self.direct, self.refuses = [], [], refuses

    def __getitem__(self, grid):
        def run(*args, **options):
            self.generic.append((grid, args, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*args):
            if self.kernel.refuses:
                raise TypeError("function takes exactly 9 arguments (12 given)")
            self.kernel.direct.append((grid, args))

        return run


@pytest.fixture(autouse=True)
def reusable(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "_reusable", lambda flat: True)


def _launch(kernel, flat, other, *integers, constants=(4, 256), programs=3):
    launch(kernel, programs, (lambda t: t, lambda t: t), (flat, other, *integers), constants)


def test_the_second_launch_is_direct():
    kernel, x, y = Stub(), torch.zeros(64), torch.zeros(64)
    _launch(kernel, x, y, 64, -5)
    _launch(kernel, x, y, 16, 1, programs=7)
    assert kernel.generic == [((3,), (x, y, 64, -5, 4, 256), {"enable_fp_fusion": False})]
    assert kernel.direct == [((7, 1, 1), (x.data_ptr(), y.data_ptr(), 16, 1, 4, 256))]


@pytest.mark.parametrize("place", [0, 1])
def test_pointers_that_are_not_aligned_never_reuse(place):
    kernel, tensors = Stub(), [torch.zeros(64), torch.zeros(64)]
    _launch(kernel, *tensors)
    tensors[place] = tensors[place][1:]
    for _ in range(2):
        _launch(kernel, *tensors)
    assert len(kernel.generic) == 3
    assert not kernel.direct


def test_what_was_compiled_for_unaligned_pointers_is_not_kept():
    kernel, x, y = Stub(), torch.zeros(64), torch.zeros(64)
    _launch(kernel, x[1:], y)
    _launch(kernel, x, y)
    assert len(kernel.generic) == 2


def test_another_dtype_constant_or_kernel_is_another_case():
    kernel, x, y = Stub(), torch.zeros(64), torch.zeros(64)
    _launch(kernel, x, y)
    _launch(kernel, x.half(), y)
    _launch(kernel, x, y, constants=(2, 256))
    other = Stub()
    _launch(other, x, y)
    assert len(kernel.generic) == 3
    assert len(other.generic) == 1


def test_a_launcher_with_other_arguments_is_asked_once():
    kernel, x, y = Stub(refuses=True), torch.zeros(64), torch.zeros(64)
    for _ in range(4):
        _launch(kernel, x, y)
    assert len(kernel.generic) == 4
    kernel.refuses = False
    _launch(kernel, x, y)
    assert not kernel.direct


def test_nothing_is_kept_where_a_case_says_too_little(monkeypatch):
    monkeypatch.undo()
    kernel, x, y = Stub(), torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        _launch(kernel, x, y)  # on the CPU: the interpreter
    assert len(kernel.generic) == 2
