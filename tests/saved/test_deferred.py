"""What waits to be encoded: until nobody can make it superfluous, and no longer."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_actmem.saved.deferred import Deferrals, Deferred
from lightning_actmem.saved.handle import Kept


class Encoder:
    """Counts how often it encodes, and holds the tensor like the real one."""

    def __init__(self) -> None:
        self.tensor = torch.randn(3)
        self.calls = 0

    def __call__(self) -> Kept:
        self.calls += 1
        return Kept(self.tensor)


def waiting(deferrals: Deferrals, result: Tensor) -> tuple[Encoder, Deferred]:
    encoder = Encoder()
    handle = Deferred(encoder, ())
    deferrals.add(handle, result)
    return encoder, handle


def test_restoring_encodes_once() -> None:
    encoder = Encoder()
    handle = Deferred(encoder, ())
    assert torch.equal(handle.restore(), encoder.tensor)
    handle.restore()
    handle.settle()
    assert encoder.calls == 1


def test_it_waits_while_the_result_is_held() -> None:
    deferrals, result = Deferrals(), torch.ones(1)
    encoder, handle = waiting(deferrals, result)
    deferrals.settle()
    assert (encoder.calls, len(deferrals.waiting)) == (0, 1)
    del result
    deferrals.settle()
    assert (encoder.calls, len(deferrals.waiting)) == (1, 0)
    assert torch.equal(handle.restore(), encoder.tensor)


def test_a_handle_that_nobody_holds_is_never_encoded() -> None:
    deferrals, result = Deferrals(), torch.ones(1)
    encoder, handle = waiting(deferrals, result)
    del handle, result
    deferrals.settle(everything=True)
    assert (encoder.calls, len(deferrals.waiting)) == (0, 0)


def test_the_oldest_of_many_and_everything_at_the_end() -> None:
    deferrals = Deferrals()
    results = [torch.ones(1) for _ in range(6)]
    pairs = [waiting(deferrals, result) for result in results]
    deferrals.settle()
    assert [encoder.calls for encoder, _ in pairs] == [1, 1, 0, 0, 0, 0]
    deferrals.settle(everything=True)
    assert [encoder.calls for encoder, _ in pairs] == [1] * 6
    assert len(deferrals.waiting) == 0
