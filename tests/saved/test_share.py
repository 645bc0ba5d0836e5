"""Sharing: any view of what is stored finds it, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_actmem.saved.geometry import Geometry, extent
from lightning_actmem.saved.handle import Kept
from lightning_actmem.saved.ledger import Charge, Ledger
from lightning_actmem.saved.payload import EXACT_BITS, DecodeCache, Payload
from lightning_actmem.saved.share import SharedStorages
from lightning_actmem_kernels import CodecSpec, Layout, encode

IDENTITY = CodecSpec("identity")
UNIFORM = CodecSpec("uniform", bits=4)


def store(shared: SharedStorages, tensor: Tensor, spec: CodecSpec = IDENTITY) -> Any:
    layout = Layout.of(tensor)
    assert layout is not None
    tensors = encode(layout.flatten(tensor), spec, key=0)
    payload = Payload(tensors, spec, layout.numel, tensor.dtype, 0, None, DecodeCache(), (Charge(Ledger()),))
    return shared[tensor.untyped_storage()].add(Geometry.of(tensor), layout, payload)


def find(shared: SharedStorages, tensor: Tensor, least_bits: int = 1) -> Any:
    return shared[tensor.untyped_storage()].find(Geometry.of(tensor), least_bits)


def views(base: Tensor) -> st.SearchStrategy[Tensor]:
    """Draw views of a [4, 6] tensor: slices, steps, transposes, expansions, reshapes."""
    return st.sampled_from(
        [
            base,
            base.t(),
            base.view(-1),
            base.view(2, 12),
            base[1:],
            base[:, 1:],
            base[:, ::2],
            base[2],
            base[:, 3],
            base[1:2].expand(5, 6),
            base.unsqueeze(1),
            base[3, 5],
        ]
    )


@given(st.data())
def test_every_view_of_a_stored_tensor_is_found_and_equal(data: st.DataObject) -> None:
    base = torch.arange(24.0).view(4, 6)
    shared = SharedStorages()
    handle = store(shared, base)
    view = data.draw(views(base))
    found = find(shared, view)
    restored = found.restore()
    assert torch.equal(restored, view)
    assert restored.stride() == view.stride()
    assert found.payload is handle.payload


@given(st.data())
def test_a_view_outside_the_stored_part_is_not_found(data: st.DataObject) -> None:
    base = torch.arange(24.0).view(4, 6)
    shared = SharedStorages()
    handle = store(shared, base[1:3])
    view = data.draw(views(base))
    offsets = torch.arange(24).as_strided(view.shape, view.stride(), view.storage_offset())
    inside = bool(((offsets >= 6) & (offsets < 18)).all())
    assert (find(shared, view) is not None) == inside
    assert handle.payload is not None


def test_a_tensor_with_gaps_is_found_by_the_same_geometry_only() -> None:
    base = torch.arange(24.0).view(4, 6)
    shared = SharedStorages()
    handle = store(shared, base[:, ::2])
    assert torch.equal(find(shared, base[:, ::2]).restore(), base[:, ::2])
    assert find(shared, base[:, 1::2]) is None
    assert find(shared, base) is None
    assert handle.restore().stride() == (6, 2)


def test_version_dtype_and_death_end_the_match() -> None:
    base = torch.arange(24.0)
    shared = SharedStorages()
    handle = store(shared, base)
    assert find(shared, base.view(torch.int32)) is None
    assert find(shared, base) is not None
    base.add_(1)
    assert find(shared, base) is None
    handle = store(shared, base)
    assert find(shared, base) is not None
    del handle
    assert find(shared, base) is None


def test_a_rounded_copy_does_not_serve_an_exact_request() -> None:
    base = torch.randn(512)
    shared = SharedStorages()
    handle = store(shared, base, UNIFORM)
    assert find(shared, base, least_bits=EXACT_BITS) is None
    assert find(shared, base, least_bits=4).payload is handle.payload


def test_a_storage_kept_alive_serves_every_view_by_reference() -> None:
    base = torch.randn(512)
    shared = SharedStorages()
    charge = Charge(Ledger(), saved_bytes=base.nbytes)
    kept = Kept(base, charge=charge)
    shared[base.untyped_storage()].add_kept(kept)
    assert find(shared, base) is kept
    found = find(shared, base[3:9], least_bits=EXACT_BITS)
    assert isinstance(found, Kept)
    assert found.restore().data_ptr() == base[3:].data_ptr()
    base.add_(1)
    assert find(shared, base[3:9]) is None  # another version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.restore()
    del kept
    assert shared[base.untyped_storage()].held_charge() is charge  # the view's handle holds it on
    del charge, found
    assert shared[base.untyped_storage()].held_charge() is None


def test_a_contiguous_copy_serves_for_the_values_of_the_original() -> None:
    base = torch.randn(2, 3, 4, 5).transpose(1, 2)
    shared = SharedStorages()
    copy = base.reshape(-1, 3, 5).clone()
    handle = store(shared, copy)
    entry = shared[base.untyped_storage()]
    entry.add_copy(Geometry.of(base), handle)
    found = entry.find_values(Geometry.of(base), EXACT_BITS)
    assert found is not None
    assert torch.equal(found.restore(), base)
    assert find(shared, base) is None
    assert entry.find_values(Geometry.of(base[0]), 1) is None


def test_an_address_used_again_is_another_storage() -> None:
    shared = SharedStorages()
    kept = []
    for value in range(50):
        tensor = torch.full((1024,), float(value))
        assert find(shared, tensor) is None
        kept.append(store(shared, tensor))
        del tensor
    assert [handle.restore()[0].item() for handle in kept] == list(range(50))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20)), max_size=4))
def test_extent_is_the_reach_of_a_view(dims: list[tuple[int, int]]) -> None:
    size, stride = tuple(n for n, _ in dims), tuple(s for _, s in dims)
    offsets = torch.arange(1 + sum((n - 1) * s for n, s in dims)).as_strided(size, stride)
    assert extent(size, stride) == int(offsets.max()) + 1
    assert extent((*size, 0), (*stride, 1)) == 0


def test_a_first_kept_tensor_is_known_while_its_handle_lives() -> None:
    base = torch.randn(8)
    identity = base.untyped_storage()._cdata
    shared = SharedStorages()
    assert not shared.is_known(identity)
    kept = Kept(base, charge=Charge(Ledger(), saved_bytes=base.nbytes, raw_bytes=base.nbytes))
    shared.add_first(identity, kept)
    assert shared.is_known(identity)
    del kept
    assert not shared.is_known(identity)  # the storage may be gone, and its identity be another's


def test_an_entry_takes_over_what_is_kept() -> None:
    base = torch.randn(8)
    shared = SharedStorages()
    charge = Charge(Ledger(), saved_bytes=base.nbytes, raw_bytes=base.nbytes)
    kept = Kept(base, charge=charge)
    shared.add_first(base.untyped_storage()._cdata, kept)
    entry = shared[base.untyped_storage()]
    assert find(shared, base, least_bits=EXACT_BITS) is kept
    assert entry.held_charge() is charge
    assert entry.raw_charge() is charge
    shared.clear()
    assert not shared.is_known(base.untyped_storage()._cdata)
