"""Indices of max pools: 4 bits each, and exactly what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.saved.window import window_of

CASES: dict[str, dict[str, Any]] = {
    "square": {"kernel_size": 2},
    "resnet": {"kernel_size": 3, "stride": 2, "padding": 1},
    "rectangle": {"kernel_size": (4, 3), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    "ceil": {"kernel_size": [3, 3], "stride": [2, 3], "ceil_mode": True},
}


def pooled_gradient(x: Tensor, options: dict[str, Any], engine: ActMemEngine | None) -> Tensor:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    if engine is None:
        out = F.max_pool2d(leaf * 1, **options)
    else:
        with engine.compress(inputs=x):
            out = F.max_pool2d(leaf * 1, **options)
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), leaf)[0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_bit_equal_and_takes_4_bits_per_index(name: str, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 17, 14).contiguous(memory_format=memory_format)
    engine = ActMemEngine(bits=2, min_elements=0)
    assert torch.equal(pooled_gradient(x, CASES[name], engine), pooled_gradient(x, CASES[name], None))
    outputs = F.max_pool2d(x, **CASES[name]).numel()
    (row,) = (row for row in engine.report().rows if row.codec == "window-4")
    assert row.saved_bytes == -(-outputs // 2)
    assert row.raw_bytes == 8 * outputs


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_indices_come_back(data: st.DataObject) -> None:
    small = st.integers(1, 4)
    kernel = data.draw(small), data.draw(small)
    options = {
        "kernel_size": kernel,
        "stride": (data.draw(small), data.draw(small)),
        "padding": (data.draw(st.integers(0, kernel[0] // 2)), data.draw(st.integers(0, kernel[1] // 2))),
        "dilation": (data.draw(small), data.draw(small)),
        "ceil_mode": data.draw(st.booleans()),
    }
    x = torch.randn(2, 13 + data.draw(small), 13 + data.draw(small))
    _, indices = F.max_pool2d(x, return_indices=True, **options)
    window = window_of("max_pool2d", (x,), options, "cpu")
    assert window is not None
    positions = window.positions(indices)
    assert positions.max() < kernel[0] * kernel[1]
    assert torch.equal(window.indices(positions, torch.int64), indices)


def test_without_any_number_in_a_window() -> None:
    """Windows of NaN or -inf point somewhere all the same: to the place where plain autograd sends the gradient."""
    for value in (float("nan"), -float("inf")):
        x = torch.full((1, 1, 6, 6), value)
        engine = ActMemEngine(bits=2, min_elements=0)
        assert torch.equal(pooled_gradient(x, CASES["resnet"], engine), pooled_gradient(x, CASES["resnet"], None))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(5), nn.MaxPool1d(2), nn.MaxPool3d(2), nn.AdaptiveMaxPool2d(3)])
def test_other_pools_keep_whole_indices(pool: nn.Module) -> None:
    sizes = {nn.MaxPool1d: (2, 3, 20), nn.MaxPool3d: (1, 2, 6, 6, 6)}
    x = torch.randn(*sizes.get(type(pool), (2, 3, 20, 20)), requires_grad=True)
    engine = ActMemEngine(bits=2, min_elements=0)
    with engine.compress(inputs=x):
        out = pool(x * 1)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (plain,) = torch.autograd.grad(pool(x * 1).square().sum(), x)
    assert torch.equal(grad, plain)
    assert not any(row.codec == "window-4" for row in engine.report().rows)
