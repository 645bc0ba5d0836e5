"""Layout: flat memory order and back, with size, stride and values kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_actmem_kernels import Layout


def _arange(*size):
    return torch.arange(torch.Size(size).numel()).view(size)


DENSE = {
    "0-d": lambda: torch.tensor(3.0),
    "1-d": lambda: _arange(7),
    "contiguous": lambda: _arange(2, 3, 4),
    "transposed": lambda: _arange(5, 4).t(),
    "permuted": lambda: _arange(2, 3, 4, 5).permute(2, 0, 3, 1),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last one channel": lambda: torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "rows of a larger tensor": lambda: _arange(9, 4)[3:7],
    "expanded": lambda: _arange(5).expand(3, 5),
    "expanded inside": lambda: _arange(4, 1, 5).expand(4, 6, 5),
    "expanded scalar": lambda: torch.tensor(2.0).expand(3, 4),
    "size 1 with an odd stride": lambda: _arange(4).as_strided((4, 1, 1), (1, 77, 0)),
    "empty": lambda: torch.empty(3, 0, 2),
    "empty and expanded": lambda: torch.empty(0).expand(3, 0),
}
GAPPED = {
    "columns": lambda: _arange(6, 8)[:, 2:5],
    "every second": lambda: _arange(20)[::2],
    "transposed columns": lambda: _arange(6, 8)[:, 2:5].t(),
    "expanded columns": lambda: _arange(6, 8)[:, 2:5].unsqueeze(1).expand(6, 4, 3),
}
OVERLAPPING = {
    "unfold": lambda: _arange(10).unfold(0, 4, 1),
    "as_strided": lambda: _arange(10).as_strided((3, 3), (1, 1)),
    "as_strided rows": lambda: _arange(10).as_strided((3, 3), (2, 1)),
}


def _assert_round_trip(t):
    layout = Layout.of(t)
    flat = layout.flatten(t)
    assert flat.ndim == 1
    assert flat.is_contiguous()
    assert flat.numel() == layout.numel
    back = layout.unflatten(flat.clone())
    assert back.size() == t.size()
    assert back.stride() == t.stride()
    assert torch.equal(back, t)
    return layout, flat


@pytest.mark.parametrize("name", DENSE)
def test_dense_tensors_are_flattened_without_a_copy(name):
    t = DENSE[name]()
    layout, flat = _assert_round_trip(t)
    assert layout.dense
    assert flat.data_ptr() == t.data_ptr()


@pytest.mark.parametrize("name", GAPPED)
def test_gapped_tensors_are_copied(name):
    t = GAPPED[name]()
    layout, flat = _assert_round_trip(t)
    assert not layout.dense
    assert flat.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_tensors_have_no_layout(name):
    assert Layout.of(OVERLAPPING[name]()) is None


def test_flat_is_in_memory_order():
    storage = _arange(60)
    t = storage.view(3, 4, 5).permute(1, 2, 0)
    assert torch.equal(Layout.of(t).flatten(t), storage)


def test_expanded_dimensions_are_stored_once():
    layout = Layout.of(torch.zeros(8, 1, 5).expand(8, 100, 5))
    assert layout.numel == 40
    assert layout.size == (8, 100, 5)


def test_unflatten_takes_another_dtype_and_a_storage_offset():
    t = torch.randn(3, 4).t()
    flat = torch.arange(20)[5:17]
    back = Layout.of(t).unflatten(flat)
    assert back.dtype == torch.int64
    assert torch.equal(back.t().reshape(-1), flat)


def test_flatten_leaves_autograd_behind():
    t = torch.randn(3, 4, requires_grad=True) * 2
    assert not Layout.of(t).flatten(t).requires_grad


def test_layouts_are_equal_hashable_values():
    assert Layout.of(torch.zeros(3, 4)) == Layout.of(torch.ones(3, 4))
    assert len({Layout.of(torch.zeros(3, 4)), Layout.of(torch.ones(3, 4)), Layout.of(torch.ones(4, 3).t())}) == 2


@st.composite
def strided_tensors(draw):
    sizes = draw(st.lists(st.integers(1, 5), max_size=5))
    t = torch.randn(sizes)
    if draw(st.booleans()) and t.ndim:
        t = t.permute(draw(st.permutations(range(t.ndim))))
    for dim in range(t.ndim):
        if draw(st.integers(0, 3)) == 0:
            t = t[
                (slice(None),) * dim + (slice(draw(st.integers(0, t.shape[dim] - 1)), None, draw(st.integers(1, 2))),)
            ]
    for dim in range(t.ndim):
        if draw(st.integers(0, 4)) == 0:
            t = t.narrow(dim, 0, 1).expand(*t.shape[:dim], draw(st.integers(1, 4)), *t.shape[dim + 1 :])
    return t


@given(strided_tensors())
def test_round_trip_of_any_view(t):
    layout, flat = _assert_round_trip(t)
    assert layout.dense == (flat.data_ptr() == t.data_ptr())
