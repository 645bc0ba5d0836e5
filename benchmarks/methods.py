"""What is compared: ways to hold fewer bytes for the backward pass, and the bytes that each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_actmem import ActMemEngine
from lightning_actmem.saved.identify import is_weight
from lightning_actmem.saved.ledger import BORROWED
from lightning_actmem_kernels import CodecSpec, Layout, decode, encode

from .models import CHAIN_OPERATIONS, CLASSES, Workload


@dataclass(frozen=True)
class Stored:
    """Bytes that are kept alive for the backward pass when the forward pass has ended.

    Args:
        device_bytes: On the device of the model.
        host_bytes: On the host, when that is another device.
        exact_bytes: The part of ``device_bytes`` that stays exact (loss, statistics, ...); only ActMem has it.
    """

    device_bytes: int
    host_bytes: int = 0
    exact_bytes: int | None = None


class Method:
    """Plain training; the base of the others."""

    name = "plain"
    bits: int | None = None

    def applied(self, work: Workload) -> AbstractContextManager[Any]:
        """Return the context around forward pass and loss."""
        return nullcontext()

    def step(self, work: Workload) -> None:
        """Run forward and backward pass. Gradients add up, so that their memory is there from the first step on."""
        with self.applied(work):
            loss = work.loss()
        loss.backward()

    def stored(self, work: Workload) -> Stored:
        """Run a step and find out what it stores."""
        meter = Meter(work)
        with meter.hooks(Tensor.detach, lambda tensor: tensor), self.applied(work):
            loss = work.loss()
        stored = meter.stored()
        loss.backward()
        return stored

    def note(self, work: Workload) -> str:
        """Return what a reader of the figures has to know."""
        return ""


class ActMem(Method):
    """This library.

    Args:
        bits: Bits per element.
        **fields: Other settings.
    """

    name = "actmem"

    def __init__(self, bits: int, **fields: Any) -> None:
        self.bits = bits
        self.fields = fields
        self.engine = ActMemEngine(bits=bits, **fields)

    def applied(self, work: Workload) -> AbstractContextManager[Any]:
        return self.engine.compress(work.model, inputs=(work.inputs, work.targets))

    def stored(self, work: Workload) -> Stored:
        with self.applied(work):
            loss = work.loss()
        loss.backward()
        report = self.engine.report()
        exact_bytes = sum(row.saved_bytes for row in report.rows if row.kind not in BORROWED and row.codec == "exact")
        if report.device_bytes is None:
            return Stored(report.saved_bytes, exact_bytes=exact_bytes)
        return Stored(report.device_bytes, report.offloaded_bytes or 0, exact_bytes)

    def note(self, work: Workload) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.fields.items())


class BareHooks(Method):
    """The least that following operations and hooks can take: a torch-function mode that runs, hooks that detach."""

    name = "bare hooks"

    @contextmanager
    def applied(self, work: Workload) -> Iterator[None]:
        with _Bare(), saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            yield

    def stored(self, work: Workload) -> Stored:
        """Return what plain training stores, as these hooks do: the meter is a pair of such hooks itself."""
        return Method().stored(work)


class _Bare(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **kwargs) if kwargs else func(*args)


class CopyAlone(Method):
    """What the codec that only copies does in a step of the chain, called by nobody's hooks: no training at all."""

    name = "copy alone"
    _spec = CodecSpec("identity")

    def __init__(self) -> None:
        self._tensors = [torch.randn(1, CLASSES) for _ in range(CHAIN_OPERATIONS)]

    def step(self, work: Workload) -> None:
        """Encode and decode a tensor for each operation."""
        packed = []
        for tensor in self._tensors:
            layout = Layout.of(tensor)
            assert layout is not None, "dense"
            packed.append((layout, encode(layout.flatten(tensor), self._spec, key=0)))
        while packed:
            layout, payload = packed.pop()
            layout.unflatten(decode(payload, self._spec, numel=layout.numel, dtype=torch.float32, key=0))

    def stored(self, work: Workload) -> Stored:
        """Return the bytes of the copies."""
        return Stored(sum(tensor.nbytes for tensor in self._tensors))


class Checkpoint(Method):
    """``torch.utils.checkpoint`` around each block."""

    name = "checkpoint"

    @contextmanager
    def applied(self, work: Workload) -> Iterator[None]:
        for block in work.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in work.blocks:
                del block.forward

    def note(self, work: Workload) -> str:
        return "" if work.blocks else "the model has no blocks: same as plain"


class SaveOnCpu(Method):
    """``torch.autograd.graph.save_on_cpu``, pinned on a GPU."""

    name = "save_on_cpu"

    def applied(self, work: Workload) -> save_on_cpu:
        return save_on_cpu(pin_memory=work.device.type == "cuda")

    def stored(self, work: Workload) -> Stored:
        offload = self.applied(work)
        meter = Meter(work)
        with meter.hooks(offload.pack_hook, offload.unpack_hook):
            loss = work.loss()
        stored = meter.stored()
        loss.backward()
        return stored

    def note(self, work: Workload) -> str:
        return "a no-op on the CPU: same as plain" if work.device.type == "cpu" else "stored in pinned host memory"


class Meter:
    """Finds out what a pair of hooks keeps alive: the bytes of unique storages.

    Weights in every disguise, buffers and the batch are left out, as in ActMem's ledger: they are alive anyway.

    Args:
        work: What is measured.
    """

    def __init__(self, work: Workload) -> None:
        alive_anyway = (*work.model.parameters(), *work.model.buffers(), work.inputs, work.targets)
        self._alive_anyway = {tensor.untyped_storage()._cdata for tensor in alive_anyway}
        self._device = work.device
        # A weak reference keeps the identity of a storage from being given to another one.
        self._storages: dict[int, tuple[StorageWeakRef, int, bool]] = {}

    def hooks(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> saved_tensors_hooks:
        """Return the pair of hooks, metered."""

        def metered_pack(tensor: Tensor) -> Any:
            packed = pack(tensor)
            if not is_weight(tensor):
                for part in packed if isinstance(packed, tuple) else (packed,):
                    self._note(part)
            return packed

        return saved_tensors_hooks(metered_pack, unpack)

    def stored(self) -> Stored:
        """Return the bytes that are alive now."""
        alive = [(nbytes, here) for reference, nbytes, here in self._storages.values() if not reference.expired()]
        return Stored(sum(n for n, here in alive if here), sum(n for n, here in alive if not here))

    def _note(self, part: Any) -> None:
        if isinstance(part, Tensor) and part.untyped_storage()._cdata not in self._alive_anyway:
            storage = part.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), part.device == self._device


def all_methods(bits: tuple[int, ...], **fields: Any) -> list[Method]:
    """Return every method, with ActMem at each of these bits and with these other settings."""
    return [Method(), *(ActMem(each, **fields) for each in bits), Checkpoint(), SaveOnCpu()]
