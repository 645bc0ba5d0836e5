"""Handles: what they hold, and what the decode cache remembers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_actmem.saved.geometry import Geometry
from lightning_actmem.saved.handle import DecodeCache, Kept, Packed, Payload, Reshaped, Stand
from lightning_actmem_kernels import CodecSpec, encode


class CountingPayload(Payload):
    """Counts how often it is decoded."""

    decoded = 0

    def decode(self) -> Tensor:
        self.decoded += 1
        return super().decode()


def payload(cache: DecodeCache, uses: int) -> CountingPayload:
    x = torch.arange(64.0)
    spec = CodecSpec("uniform", bits=8)
    made = CountingPayload(encode(x, spec, key=1), spec, 64, x.dtype, 1, None, cache, ())
    made.uses = uses
    return made


def test_what_is_asked_for_often_is_remembered() -> None:
    cache = DecodeCache()
    often, seldom = payload(cache, uses=3), payload(cache, uses=2)
    for _ in range(3):
        assert torch.equal(cache.decode(often), cache.decode(seldom))
    assert (often.decoded, seldom.decoded) == (1, 3)


def test_only_the_last_few_are_remembered() -> None:
    cache = DecodeCache(capacity=2)
    payloads = [payload(cache, uses=3) for _ in range(3)]
    for each in payloads:
        cache.decode(each)
    for each in reversed(payloads):
        cache.decode(each)
    assert [each.decoded for each in payloads] == [2, 1, 1]


def test_what_has_been_changed_in_place_is_decoded_anew() -> None:
    cache = DecodeCache()
    made = payload(cache, uses=3)
    first = cache.decode(made).clone()
    cache.decode(made).zero_()
    assert torch.equal(cache.decode(made), first)


def test_nothing_is_remembered_of_the_dead() -> None:
    cache = DecodeCache()
    made = payload(cache, uses=3)
    cache.decode(made)
    del made
    assert not cache._segments


def test_handles_count_as_uses() -> None:
    made = payload(DecodeCache(), uses=0)
    handles = [Packed(made, (64,), (1,), 0) for _ in range(3)]
    for handle in handles:
        handle.restore()
    assert (made.uses, made.decoded) == (3, 1)


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
