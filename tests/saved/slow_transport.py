"""A transport for the CPU that does everything as late as it may, and notices when memory is freed too early."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from lightning_actmem.saved.parcel import Piece, Transfer

GARBAGE = 0xA5


@dataclass(eq=False)
class Done:
    """The end of a copy: reached or not, waited for or not."""

    reached: bool = False
    awaited: bool = False


@dataclass
class SlowTransport:
    """Copies only when somebody waits for it, in the order of the calls.

    A buffer holds garbage until its copy has run. Where a buffer is freed before its copy has ended, the number in
    `freed_early` goes up: on a GPU somebody else would write into it meanwhile.

    Attributes:
        device_type: What counts as a device.
        stream: The current stream.
        calls: How often each method has been called.
        idle: Host memory by its size.
        made: Host memory ever made.
        freed_early: Buffers freed before their copy has ended.
        queue: Copies to come.
        fails: What `send` and `bring` raise, if they do.
    """

    device_type: str = "cpu"
    stream: str = "main"
    calls: Counter[str] = field(default_factory=Counter)
    idle: dict[int, list[Tensor]] = field(default_factory=dict)
    made: int = 0
    freed_early: int = 0
    queue: deque[tuple[Callable[[], object], Done]] = field(default_factory=deque)
    fails: Exception | None = None

    def check(self) -> None:
        self.calls["check"] += 1

    def origin(self, device: torch.device) -> str:
        return self.stream

    def send(
        self, tensors: Sequence[Tensor], pieces: Sequence[Piece], nbytes: int, origin: Any
    ) -> tuple[Tensor, Transfer]:
        self.calls["send"] += 1
        if self.fails is not None:
            raise self.fails
        buffer = torch.full((nbytes,), GARBAGE, dtype=torch.uint8)
        for tensor, piece in zip(tensors, pieces, strict=True):
            buffer[piece.start : piece.stop] = tensor.reshape(-1).view(torch.uint8)
        idle = self.idle.get(nbytes)
        if idle:
            host = idle.pop()
        else:
            host = torch.full((nbytes,), GARBAGE, dtype=torch.uint8)
            self.made += 1
        return host, self._transfer(buffer, host, origin, inbound=False)

    def bring(self, host: Tensor, nbytes: int, origin: Any) -> Transfer:
        self.calls["bring"] += 1
        if self.fails is not None:
            raise self.fails
        buffer = torch.full((nbytes,), GARBAGE, dtype=torch.uint8)
        return self._transfer(buffer, host, origin, inbound=True)

    def read(self, transfer: Transfer) -> None:
        self.calls["read"] += 1
        if self.stream != transfer.origin or transfer.inbound:
            self._run_until(transfer.done)
        if self.stream == transfer.origin and transfer.inbound:
            self.finish(transfer)

    def finish(self, transfer: Transfer) -> None:
        self.calls["finish"] += 1
        transfer.done.awaited = True
        transfer.pending = False

    def recycle(self, host: Tensor, origin: Any) -> None:
        self.idle.setdefault(host.nbytes, []).append(host)

    def release(self) -> None:
        self.idle.clear()

    def _transfer(self, buffer: Tensor, host: Tensor, origin: Any, *, inbound: bool) -> Transfer:
        done, memory = Done(), buffer.detach()  # the copy uses the memory, as on a GPU, and not the object
        to, source = (memory, host) if inbound else (host, memory)
        self.queue.append((lambda: to.copy_(source), done))
        finalize(buffer, self._free, memory, done).atexit = False
        return Transfer(buffer, origin, done, inbound=inbound)

    def _run_until(self, done: Done) -> None:
        while not done.reached:
            copy, reached = self.queue.popleft()
            copy()
            reached.reached = True

    def _free(self, memory: Tensor, done: Done) -> None:
        if not done.awaited:
            self.freed_early += 1
            memory.fill_(GARBAGE)  # somebody else's now
