"""The transport for CUDA, as far as it shows without a GPU; the rest is in `test_offload_gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_actmem.errors import ActMemError
from lightning_actmem.memory import is_out_of_memory
from lightning_actmem.saved.parcel import pieces_of
from lightning_actmem.saved.transport import CudaTransport


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do() -> None:
    with pytest.raises(ActMemError, match=r"torch sees no CUDA device\. Set offload=False, or train on a machine with"):
        CudaTransport().check()


def test_making_one_does_not_touch_the_device() -> None:
    """Settings are made before a launcher forks or spawns: CUDA must not be initialised by then."""
    before = torch.cuda.is_initialized()
    assert CudaTransport().device_type == "cuda"
    assert torch.cuda.is_initialized() == before


def test_no_pinned_memory_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def empty(size: int, **_: Any) -> Any:
        sizes.append(size)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ActMemError, match=r"8,388,608 bytes more of pinned host memory.* \(offload='8GiB'\)") as caught:
        CudaTransport()._pinned(5_000_000, torch.device("cuda"))
    assert sizes == [1 << 23]
    assert is_out_of_memory(caught.value)  # a batch-size finder backs off


def test_idle_memory_is_used_again_and_given_back() -> None:
    transport, device = CudaTransport(), torch.device("cuda", 0)
    host = torch.zeros(1 << 12, dtype=torch.uint8)

    class Origin:
        pass

    origin: Any = Origin()
    origin.device = device
    transport.recycle(host, origin)
    assert transport._pinned(3000, device) is host  # the next power of two
    transport.recycle(host, origin)
    transport.release()
    assert not transport._idle


class Stream:
    """A stream that writes down what it is told."""

    current: Stream
    log: list[str]

    def __init__(self, device: torch.device, name: str = "side") -> None:
        self.device = device
        self.name = name

    def record_event(self) -> str:
        self.note("records")
        return self.name

    def wait_event(self, event: str) -> None:
        self.note(f"waits for {event}")

    def note(self, what: str) -> None:
        Stream.log.append(f"{self.name} {what}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[Stream, Stream]:
    """Two streams of a device that is the CPU; the first is the current one."""
    device = torch.device("cpu")
    main, other = Stream(device, "main"), Stream(device, "other")
    Stream.current, Stream.log = main, []

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        try:
            yield
        finally:
            Stream.current = before

    def noted(name: str, function: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            Stream.current.note(name)
            return function(*arguments, **keywords)

        return run

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream.current)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, **_: empty(size, dtype=dtype))
    monkeypatch.setattr(torch, "_foreach_copy_", noted("gathers", torch._foreach_copy_))
    monkeypatch.setattr(Tensor, "copy_", noted("copies", Tensor.copy_))
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: stream.note("keeps the memory"))
    return main, other


def test_each_stream_waits_for_the_other(streams: tuple[Stream, Stream]) -> None:
    main, other = streams
    transport: Any = CudaTransport()
    tensors = (torch.arange(300, dtype=torch.uint8), torch.randn(5))
    pieces, nbytes = pieces_of(tensors)
    origin = transport.origin(main.device)
    assert origin is main
    Stream.current = other  # another stream's turn: nothing of this may run on it
    host, sent = transport.send(tensors, pieces, nbytes, origin)
    out = ["main gathers", "main records", "side waits for main", "side copies", "side records"]
    assert Stream.log == out
    back = transport.bring(host, nbytes, origin)
    assert Stream.log == [*out, "main records", "side waits for main", "side copies", "side records"]
    for tensor, piece in zip(tensors, pieces, strict=True):
        assert torch.equal(piece.within(back.buffer), tensor)
        assert torch.equal(piece.within(sent.buffer), tensor)


def test_a_stream_that_reads_waits_once(streams: tuple[Stream, Stream]) -> None:
    main, other = streams
    transport: Any = CudaTransport()
    values = torch.arange(300, dtype=torch.uint8)
    pieces, nbytes = pieces_of([values])
    host, sent = transport.send([values], pieces, nbytes, main)
    back = transport.bring(host, nbytes, main)
    Stream.log = []
    transport.read(sent)
    assert (Stream.log, sent.pending) == ([], True)  # it is there, and must stay until the copy is done
    transport.finish(sent)
    transport.finish(sent)
    assert (Stream.log, sent.pending) == (["main waits for side"], False)
    Stream.log = []
    Stream.current = other
    transport.read(back)
    assert (Stream.log, back.pending) == (["other waits for side", "other keeps the memory"], True)
    Stream.log = []
    Stream.current = main
    transport.read(back)
    transport.read(back)
    assert (Stream.log, back.pending) == (["main waits for side"], False)
