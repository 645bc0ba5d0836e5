"""The transport for CUDA, as far as it shows without a GPU; the rest is in `test_offload_gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_actmem.errors import ActMemError
from lightning_actmem.memory import is_out_of_memory
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
