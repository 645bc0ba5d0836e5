"""Tests of encoded segments, and of the cache of decoded ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_actmem.saved.handle import Packed
from lightning_actmem.saved.payload import DecodeCache, Payload
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
