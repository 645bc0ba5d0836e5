"""Handles: what they hold, and what the decode cache remembers."""

from __future__ import annotations

import pytest
import torch

from lightning_actmem.saved.geometry import Geometry
from lightning_actmem.saved.handle import Kept, Reshaped, Stand


def test_a_kept_tensor_gives_views_of_its_version_only() -> None:
    x = torch.arange(12.0).view(3, 4)
    kept = Kept(x)
    column = kept.view(Geometry.of(x[:, 1]))
    assert column is not None
    assert torch.equal(column.restore(), x[:, 1])
    assert kept.view(Geometry.of(x.view(torch.int32))) is None
    x.add_(1)
    assert kept.view(Geometry.of(x)) is None
    with pytest.raises(RuntimeError, match=r"FloatTensor \[3, 4\]\] is at version 1; expected version 0"):
        kept.restore()


def test_a_kept_result_does_not_hold_its_graph() -> None:
    out = torch.ones(3, requires_grad=True).exp()
    assert Kept(out).restore().grad_fn is None
    assert Kept(out).restore().data_ptr() == out.data_ptr()


def test_a_stand_takes_no_memory_without_a_mask() -> None:
    like = torch.ones(4, 5, dtype=torch.bfloat16)
    stand = Stand(like).restore()
    assert (stand.shape, stand.dtype, stand.untyped_storage().nbytes()) == (like.shape, like.dtype, 2)


def test_a_stand_with_a_mask_takes_two_values() -> None:
    stand = Stand(torch.ones(4), low=-1.0, high=2.0)
    stand.mask = Kept(torch.tensor([True, False, False, True]))
    assert stand.restore().tolist() == [2, -1, -1, 2]


def test_reshaped_values() -> None:
    x = torch.arange(12.0)
    reshaped = Reshaped(Kept(x), (3, 4))
    assert torch.equal(reshaped.restore(), x.view(3, 4))
    assert reshaped.bits == 32
