"""Offload on a GPU: the streams keep their order, memory is really freed, and the host waits for nothing.

The gradients are compared to the bit with those of the same run without offload. What would hide a mistake in the
order of the streams is taken away: copies that are done at once, and freed memory that keeps its contents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_actmem import ActMemEngine, ActMemError
from lightning_actmem.saved.offload import Offload
from lightning_actmem.saved.parcel import Transfer, pieces_of
from lightning_actmem.saved.transport import CudaTransport
from tests import models

pytestmark = pytest.mark.gpu

PARCEL = 3 << 20  # the largest segment of the model below takes 2.1 MiB
WIDTH, BATCH = 256, 4096
SLEEP_CYCLES = 10_000_000  # some 5 ms
GARBAGE = 0xA5


class Sleeper(CudaTransport):
    """Has the side stream sleep before every copy, and notes where pinned memory has been."""

    def __init__(self, cycles: int = SLEEP_CYCLES) -> None:
        super().__init__()
        self.cycles = cycles
        self.transfers = 0
        self.pinned: set[int] = set()

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        side = super()._side(device)
        self.transfers += 1
        if self.cycles:
            with torch.cuda.stream(side):
                torch.cuda._sleep(self.cycles)
        return side

    def _pinned(self, nbytes: int, device: torch.device) -> Tensor:
        host = super()._pinned(nbytes, device)
        assert host.is_pinned()
        self.pinned.add(host.data_ptr())
        return host


class Trash(nn.Module):
    """Takes freed memory and fills it, in forward and backward; sleeps before, if it is told to."""

    def __init__(self, cycles: int = 0) -> None:
        super().__init__()
        self.cycles = cycles

    def forward(self, x: Tensor) -> Tensor:
        fill(self.cycles)
        x = x * 1
        x.register_hook(lambda _: fill(self.cycles))
        return x


def fill(cycles: int) -> None:
    if cycles:
        torch.cuda._sleep(cycles)
    held = [torch.full((size,), GARBAGE, dtype=torch.uint8, device="cuda") for size in (PARCEL, PARCEL, 1 << 17, 4096)]
    del held


def stack(depth: int = 8, cycles: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(models.MlpBlock(WIDTH), nn.Dropout(0.1), Trash(cycles)) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 8)).cuda()


def engine_of(transport: CudaTransport | None, limit_bytes: int = 0, **config: Any) -> ActMemEngine:
    engine = ActMemEngine(**{"bits": 4, **config})
    if transport is not None:
        engine._store.offload = Offload(engine.ledger, limit_bytes, transport, parcel_bytes=PARCEL, least_bytes=1024)
    return engine


def once(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    with engine.compress(model, inputs=x):
        loss = model(x).square().mean()
    loss.backward()


def gradients(
    engine: ActMemEngine, model: nn.Module, backward: Callable[..., Any] = once, steps: int = 3
) -> list[Tensor]:
    model = copy.deepcopy(model)
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    for step in range(steps):
        torch.manual_seed(step)
        backward(engine, model, x)
    torch.cuda.synchronize()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_runs_that_are_compared_are_deterministic() -> None:
    assert_same(*(gradients(engine_of(None), stack()) for _ in range(2)))


# ---------------------------------------------------------------- the order of streams


@pytest.mark.parametrize("limit_bytes", [0, 6 * PARCEL, 1 << 40])
@pytest.mark.parametrize(("copies", "compute"), [(0, 0), (SLEEP_CYCLES, 0), (0, SLEEP_CYCLES)])
def test_slow_copies_and_slow_kernels(copies: int, compute: int, limit_bytes: int) -> None:
    transport = Sleeper(copies)
    found = gradients(engine_of(transport, limit_bytes), stack(cycles=compute))
    assert_same(found, gradients(engine_of(None), stack()))
    assert (transport.transfers > 0) == (limit_bytes < 1 << 40)


@pytest.mark.parametrize(
    "config",
    [{"bits": 1}, {"bits": 2}, {"bits": 8, "derive": False}, {"codec": "identity"}, {"activations": "derivative"}],
    ids=str,
)
def test_every_kind_of_segment(config: dict[str, Any]) -> None:
    transport = Sleeper()
    found = gradients(engine_of(transport, **config), stack(4), steps=2)
    assert_same(found, gradients(engine_of(None, **config), stack(4), steps=2))
    assert transport.transfers


def retained(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    with engine.compress(model, inputs=x):
        loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def two_losses(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    with engine.compress(model, inputs=x):
        first, second = model(x).square().mean(), model(x * 2).square().mean()
    first.backward()
    second.backward()


def never(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    """A graph dies with its copies under way."""
    with engine.compress(model, inputs=x):
        model(x * 3)
    once(engine, model, x)


def on_a_stream_of_its_own(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    assert isinstance(model, nn.Sequential)
    main, other = torch.cuda.current_stream(), torch.cuda.Stream()
    with engine.compress(model, inputs=x):
        hidden = model[:3](x)
        other.wait_stream(main)
        hidden.record_stream(other)
        with torch.cuda.stream(other):
            hidden = model[3:6](hidden)
        main.wait_stream(other)
        hidden.record_stream(main)
        loss = model[6:](hidden).square().mean()
    loss.backward()
    main.wait_stream(other)


def from_another_stream(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    """Decoded on a stream that has not encoded it: the hook runs where the user's code asks for the tensor."""
    with engine.compress(model, inputs=x):
        loss = model(x).square().mean()
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        read = [value.isfinite().all() for value in saved_tensors(loss)]
    assert len(read) > 16
    torch.cuda.current_stream().wait_stream(other)
    loss.backward()


def saved_tensors(loss: Tensor) -> Iterator[Tensor]:
    """Yield what the operations behind a loss have saved, the last ones first."""
    nodes: dict[Any, None] = {loss.grad_fn: None}
    for node in (queue := list(nodes)):
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(value := getattr(node, name), Tensor):
                yield value
        for following, _ in node.next_functions:
            if following is not None and following not in nodes:
                nodes[following] = None
                queue.append(following)


@pytest.mark.parametrize("backward", [retained, two_losses, never, on_a_stream_of_its_own, from_another_stream])
def test_backward(backward: Callable[..., Any]) -> None:
    found = gradients(engine_of(Sleeper()), stack(), backward)
    assert_same(found, gradients(engine_of(None), stack(), backward))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = stack(4)[:-1], stack(4).cuda(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).cuda(1))

    found = gradients(engine_of(Sleeper()), Halves())
    assert_same(found, gradients(engine_of(None), Halves()))


# ---------------------------------------------------------------- memory


def after_forward(engine: ActMemEngine) -> int:
    """Bytes that forward and loss leave allocated."""
    model, x = stack(16), torch.randn(BATCH, WIDTH, device="cuda")
    once(engine, model, x)
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with engine.compress(model, inputs=x):
        loss = model(x).square().mean()
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return held


@pytest.mark.parametrize("limit_bytes", [0, 6 * PARCEL])
def test_device_memory_falls_by_what_the_ledger_says(limit_bytes: int) -> None:
    engine = engine_of(Sleeper(0), limit_bytes)
    plain_bytes, held_bytes = after_forward(engine_of(None)), after_forward(engine)
    report = engine.report()
    assert report.offloaded_bytes is not None
    assert report.device_bytes is not None
    assert report.offloaded_bytes > report.saved_bytes / 2
    assert held_bytes < plain_bytes / 2
    if limit_bytes:
        assert report.device_bytes <= limit_bytes


def test_live_bytes_agree_with_the_allocator() -> None:
    """Within 1 %: blocks are multiples of 512 bytes."""
    engine = engine_of(Sleeper(0))
    model, x = stack(), torch.randn(BATCH, WIDTH, device="cuda")
    once(engine, model, x)
    places = engine.ledger.whereabouts
    assert places is not None
    with engine.compress(model, inputs=x):
        loss = model(x).square().mean()
    engine.ledger.settle()
    before, booked = torch.cuda.memory_allocated(), places.device_bytes(engine.ledger.live_saved_bytes)
    engine._store.offload.start_step()  # type: ignore[union-attr]
    engine.ledger.settle()
    freed = before - torch.cuda.memory_allocated()
    assert freed > 0
    assert abs(booked - places.device_bytes(engine.ledger.live_saved_bytes) - freed) <= 0.01 * freed
    loss.backward()


def test_the_peak_of_a_step_falls() -> None:
    peaks = []
    for transport in (None, Sleeper(0)):
        engine = engine_of(transport)
        model, x = stack(16), torch.randn(BATCH, WIDTH, device="cuda")
        once(engine, model, x)
        torch.cuda.reset_peak_memory_stats()
        once(engine, model, x)
        peaks.append(torch.cuda.max_memory_allocated())
        stored = engine.report().saved_bytes
        del model, engine
    assert peaks[1] < peaks[0] - stored / 3


def test_pinned_memory_is_used_again() -> None:
    transport = Sleeper()
    engine, model = engine_of(transport), stack()
    gradients(engine, model, steps=1)
    known = set(transport.pinned)
    gradients(engine, model, steps=5)
    assert transport.pinned == known
    engine.release()
    assert not transport._idle


# ---------------------------------------------------------------- the host


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("offloads", [False, True], ids=["without", "with"])
def test_nothing_synchronises(offloads: bool) -> None:
    """Without offload too: so that a failure with it tells who is to blame."""
    engine = engine_of(Sleeper(0) if offloads else None)
    model, x = stack(), torch.randn(BATCH, WIDTH, device="cuda")
    once(engine, model, x)  # compiles kernels and pins memory
    with synchronisation_is_an_error():
        once(engine, model, x)


def test_the_host_runs_ahead_of_slow_copies() -> None:
    transport = Sleeper(0)
    engine = engine_of(transport)
    model, x = stack(), torch.randn(BATCH, WIDTH, device="cuda")
    for _ in range(2):  # the allocator has what the step needs: cudaMalloc would wait
        once(engine, model, x)
    torch.cuda.synchronize()
    side = CudaTransport._side(transport, x.device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(4_000_000_000)  # some 2 s
    once(engine, model, x)
    assert not side.query()  # the step is enqueued, and the first copy has not begun
    torch.cuda.synchronize()


def test_events_order_a_copy_that_nobody_reads() -> None:
    """A buffer that is freed while its copy waits is not handed out before the copy."""
    transport = Sleeper()
    device = torch.device("cuda", torch.cuda.current_device())
    origin = transport.origin(device)
    values = torch.arange(PARCEL, device="cuda").to(torch.uint8)
    pieces, _ = pieces_of([values])
    for _ in range(8):
        host, transfer = transport.send([values], pieces, values.nbytes, origin)
        transport.finish(transfer)
        del transfer
        fill(0)
        fetched: Transfer = transport.bring(host, values.nbytes, origin)
        transport.finish(fetched)  # not read
        del fetched
        fill(0)
        again = transport.bring(host, values.nbytes, origin)
        transport.read(again)
        assert torch.equal(again.buffer, values)
        transport.recycle(host, origin)


def test_a_model_on_the_cpu_is_refused() -> None:
    engine, model = ActMemEngine(offload=True), nn.Linear(4, 4)
    with pytest.raises(ActMemError, match=r"Linear has all of its parameters on 'cpu'"), engine.compress(model):
        pass
    with pytest.raises(ActMemError, match=r"training is to run on 'cpu'"):
        engine.check_device(torch.device("cpu"))
    engine.check_device(torch.device("cuda"))


def test_the_defaults_move_a_real_model() -> None:
    """Parcels of 8 MiB, as users have them."""
    model = models.mlp(1024, 12).cuda()
    x = torch.randn(16384, 1024, device="cuda")
    results = []
    for offload in (False, True, "96MiB"):
        engine = ActMemEngine(bits=4, offload=offload)
        model.zero_grad()
        once(engine, model, x)
        results.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        report = engine.report()
        if offload:
            assert report.offloaded_bytes
            assert report.device_bytes is not None
            assert report.device_bytes <= (96 << 20)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
