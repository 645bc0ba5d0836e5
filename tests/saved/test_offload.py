"""Offload on any machine: what moves, in which order it comes back, and when memory is let go.

`SlowTransport` copies as late as it may and fills fresh and freed memory with garbage, so that a value read before its
copy, or memory freed before it, shows in the values.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_actmem.errors import ActMemError
from lightning_actmem.saved.ledger import Charge
from tests.saved.offloading import ACTIONS, PARCEL, SEGMENT, Bench, down, in_backward
from tests.saved.slow_transport import SlowTransport


def test_the_oldest_move_and_the_last_parcel_stays() -> None:
    bench = Bench()
    bench.store(4)
    assert bench.where() == "dddd"
    bench.store(1)  # more than a parcel
    assert bench.where() == "bbbbd"  # the first is under way
    bench.store(15)
    assert bench.where() == "hhhhhhhhbbbbbbbbdddd"
    bench.offload.end_step()
    assert bench.where()[-4:] == "dddd"  # backward needs them at once
    assert bench.transport.calls["send"] == 4


def test_a_limit_leaves_the_latest_on_the_device() -> None:
    bench = Bench(limit_bytes=5 * PARCEL)
    bench.store(8)
    assert bench.where() == "d" * 8
    bench.store(24)
    # Three of five parcels' worth are for transfers.
    assert bench.where() == "h" * 16 + "b" * 8 + "d" * 8
    assert bench.peak_device_bytes() <= 5 * PARCEL


def test_large_segments_keep_to_the_limit_too() -> None:
    bench = Bench(limit_bytes=12 * PARCEL)
    bench.store(16, nbytes=3 * PARCEL)
    assert bench.where() == "h" * 13 + "bdd"
    bench.offload.end_step()
    in_backward(down(bench))
    assert bench.peak_device_bytes() <= 12 * PARCEL
    bench.offload.release()  # the next run may have smaller ones, and then moves fewer of them
    bench.segments.clear()
    bench.store(4 * 9)
    assert bench.where() == "d" * 36


def test_what_cannot_move_takes_from_the_limit() -> None:
    bench = Bench(limit_bytes=5 * PARCEL)
    exact = Charge(bench.ledger, saved_bytes=4 * PARCEL)
    bench.store(3)
    assert bench.where() == "ddd"  # less than a parcel: it waits for more
    bench.offload.end_step()
    assert bench.where() == "bbb"  # until the forward pass is over
    assert exact.saved_bytes == bench.live()[0] - 3 * SEGMENT


def test_nothing_moves_below_the_limit() -> None:
    bench = Bench(limit_bytes=100 * PARCEL)
    bench.store(64)
    bench.offload.end_step()
    in_backward(down(bench))
    assert not bench.transport.calls
    assert bench.live() == (0, 0)


def test_small_segments_stay() -> None:
    bench = Bench(least_bytes=SEGMENT)
    bench.store(1, nbytes=SEGMENT - 4)
    bench.store(8)
    assert bench.where() == "d" + "b" * 8


def test_a_parcel_is_full_or_one_large_segment() -> None:
    bench = Bench()
    bench.store(1, nbytes=3 * PARCEL)
    bench.store(2, nbytes=PARCEL - 512)
    bench.store(1, nbytes=512)
    bench.store(4)
    parcels = [segment.parcel for segment in bench.segments if segment is not None and segment.parcel is not None]
    assert [parcel.number for parcel in parcels] == [0, 1, 2, 2]
    assert [parcel.nbytes for parcel in parcels] == [3 * PARCEL, PARCEL - 512, PARCEL, PARCEL]
    in_backward(down(bench))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_every_type_comes_back(dtype: torch.dtype) -> None:
    bench = Bench()
    odd = [torch.arange(n).to(dtype) for n in (301, 307, 1009)]
    segments = [bench.segment((values,)) for values in odd]
    bench.store(16)
    assert all(segment.parcel is not None for segment in segments)
    for segment, values in zip(segments, odd, strict=True):
        assert torch.equal(segment.decode(), values)


def test_several_tensors_of_a_segment_keep_their_shapes() -> None:
    bench = Bench()
    tensors = (torch.randint(0, 255, (7, 3, 32), dtype=torch.uint8), torch.randn(7), torch.randn(3, 1).bfloat16())
    segment = bench.segment(tensors)
    bench.store(16)
    assert segment.parcel is not None
    for found, wanted in zip(bench.offload.tensors_of(segment), tensors, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
        assert found.data_ptr() % found.element_size() == 0


def test_segments_of_two_streams_do_not_travel_together() -> None:
    bench = Bench()
    for stream in ("main", "main", "side", "side", "main", "main", "main", "main"):
        bench.transport.stream = stream
        bench.store()
    numbers = [segment.parcel and segment.parcel.number for segment in bench.segments if segment is not None]
    assert numbers == [0, 0, 1, 1, None, None, None, None]
    bench.transport.stream = "main"
    in_backward(down(bench))
    assert bench.transport.freed_early == 0


def test_what_has_died_does_not_travel() -> None:
    bench = Bench()
    bench.store(3)
    bench.segments[1] = None
    bench.store(4)
    (first,) = {segment.parcel for segment in bench.segments[:1] if segment is not None}
    assert first is not None
    assert first.nbytes == PARCEL
    assert bench.where() == "b-bbbdd"


@given(actions=ACTIONS, limit_bytes=st.sampled_from([0, 5 * PARCEL, 9 * PARCEL]))
def test_whatever_happens(actions: list[tuple[str, int]], limit_bytes: int) -> None:
    """Segments of any size on two streams, read and freed in any order, in backward and outside of it."""
    bench = Bench(limit_bytes)

    def run(action: str, number: int) -> None:
        held = [at for at, segment in enumerate(bench.segments) if segment is not None]
        if action == "store":
            bench.store(3, nbytes=number // 4 * 4)
        elif action == "stream":
            bench.transport.stream = ("main", "side")[number % 2]
        elif action == "step":
            bench.offload.start_step()
        elif action == "end":
            bench.offload.end_step()
        elif action == "down":
            for at in reversed(held[number * len(held) // 100 :]):
                (bench.read_and_free if number % 2 else bench.read)(at)
        elif held and action == "read":
            bench.read(held[number % len(held)])
        elif held:
            bench.segments[held[number % len(held)]] = None

    for action, number in actions:
        if action == "down" or number % 3 == 0:
            in_backward(lambda action=action, number=number: run(action, number))
        else:
            run(action, number)
    in_backward(down(bench))
    bench.offload.release()
    assert bench.live() == (0, 0)
    assert bench.transport.freed_early == 0
    assert bench.offload._unread_bytes == bench.offload._queued_bytes == 0


def test_an_error_while_sending_leaves_everything_readable() -> None:
    bench = Bench()
    bench.store(8)
    bench.transport.fails = ActMemError("no pinned memory")
    with pytest.raises(ActMemError, match="no pinned memory"):
        bench.store(1)
    bench.transport.fails = None
    in_backward(down(bench))
    assert bench.live() == (PARCEL, 0)  # of a graph this small the copy to the host may still run when it dies
    bench.offload.start_step()
    assert bench.live() == (0, 0)


def test_no_memory_to_fetch_ahead_is_no_error() -> None:
    bench = Bench()
    bench.store(18)
    bench.transport.fails = torch.OutOfMemoryError("CUDA out of memory.")
    in_backward(*(lambda number=number: bench.read_and_free(number) for number in (17, 16)))
    with pytest.raises(torch.OutOfMemoryError):  # what is needed now is another matter
        in_backward(lambda: bench.read(0))
    bench.transport.fails = None
    in_backward(down(bench))
    assert bench.live() == (0, 0)


def test_what_is_elsewhere_stays_there() -> None:
    bench = Bench(limit_bytes=100 * PARCEL)
    bench.transport.device_type = "meta"
    here, there = torch.zeros(2048), torch.zeros(2048, device="meta")
    with pytest.raises(ActMemError, match=r"from a META device to the host, and a tensor to be packed is on 'cpu'.*"):
        bench.segment((here,))
    moved = [bench.segment((there,)) for _ in range(2)]
    stays = bench.segment((here,))
    assert [segment.origin for segment in (*moved, stays)] == ["main", "main", None]
    assert torch.equal(stays.decode(), here)


def test_the_model_has_to_be_on_the_device() -> None:
    bench = Bench()
    bench.transport.device_type = "meta"
    bench.offload.check(None)
    bench.offload.check(nn.Flatten())
    with pytest.raises(ActMemError, match=r"Linear has all of its parameters on 'cpu'\. .* or set offload=False"):
        bench.offload.check(nn.Linear(2, 2))
    bench.offload.check(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    bench.segments.append(bench.segment((torch.zeros(2048),)))  # part of a model that is not all there
    with pytest.raises(ActMemError, match=r"training is to run on 'cpu'"):
        bench.offload.check_device(torch.device("cpu"))


class Turnstile(SlowTransport):
    """Lets one thread in at a time, and takes long enough for the others to come."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Lock()

    def bring(self, *arguments: Any) -> Any:
        assert self.gate.acquire(blocking=False), "two threads at once"
        try:
            time.sleep(1e-3)
            return super().bring(*arguments)
        finally:
            self.gate.release()


def test_threads_of_autograd_take_turns() -> None:
    bench = Bench(transport=Turnstile())
    bench.store(64)
    errors: list[BaseException] = []

    def read(start: int) -> None:
        try:
            for number in reversed(range(start, 64, 4)):
                bench.read_and_free(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert bench.live()[1] == 0
    assert bench.transport.freed_early == 0
