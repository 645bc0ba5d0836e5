"""Where features meet: settings of single layers, signs, late encoding and what an operation calls its arguments."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem_kernels import CodecSpec


def codecs(engine: ActMemEngine) -> dict[str, str]:
    return {f"{site.layer}/{site.operation}.{site.role}": row.codec for site, row in engine.ledger.sites.items()}


def test_more_bits_for_a_layer_are_not_undone_by_what_its_input_follows_from() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    engine = ActMemEngine(bits=2, min_elements=0, layer_bits={"2": 8})
    with engine.compress(model):
        model(torch.randn(64, 64, requires_grad=True) * 1).sum()
    assert codecs(engine)["2/linear.input"] == "uniform-8"
    assert codecs(engine)["1/gelu.input"] == "rotated-2"


def test_no_plan_changes_a_derivative_with_bits_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    engine = ActMemEngine(bits=2, min_elements=0, activations="derivative", layer_bits={"1": 8})
    with engine.compress(model):
        model(torch.randn(64, 64, requires_grad=True) * 1).sum()
    (site,) = [site for site in engine.ledger.sites if site.role == "derivative"]
    engine.plan = {site: CodecSpec("uniform", 1)}
    with engine.compress(model):
        out = model(torch.randn(64, 64, requires_grad=True) * 1)
    assert engine.ledger.sites[site].codec == "fixed-8"
    del out


class Norm(nn.Module):
    """A batch norm whose output a ReLU reads, transposed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, transposed: bool) -> Tensor:
        h = self.norm(x)
        return F.relu(h.transpose(2, 3) if transposed else h)


@pytest.mark.parametrize(("transposed", "codec"), [(False, "rotated-1"), (True, "rotated-2")])
def test_only_the_sign_of_the_same_element_helps(transposed: bool, codec: str) -> None:
    model = Norm()
    engine = ActMemEngine(bits=2, min_elements=0)
    with engine.compress(model):
        out = model(torch.randn(4, 8, 16, 16, requires_grad=True) * 1, transposed)
    assert codecs(engine)["norm/batch_norm.input"].startswith(codec)
    del out


def test_what_waits_for_its_encoding_is_in_the_ledger() -> None:
    engine = ActMemEngine(bits=2, min_elements=0, activations="derivative")
    x = torch.randn(256, 64, requires_grad=True)
    results: list[Any] = []
    with engine.compress():
        results = [F.gelu(x * scale) for scale in range(1, 4)]
        assert engine.ledger.live_waiting_bytes >= x.nbytes
    assert engine.report().waiting_bytes >= x.nbytes
    results.clear()
    gc.collect()
    engine.ledger.settle()
    assert engine.ledger.live_waiting_bytes == 0


def test_an_encoding_that_fails_at_the_end_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ActMemEngine(bits=2, min_elements=0, activations="derivative")
    x = torch.randn(64, 64, requires_grad=True)
    results: list[Tensor] = []

    def step() -> None:
        with engine.compress():
            results.append(F.gelu(x * 1))
            monkeypatch.setattr("lightning_actmem.saved.store.encode", _fail)

    with pytest.raises(MemoryError):
        step()
    monkeypatch.undo()
    assert not engine._store.deferred.waiting
    assert not engine._store.shared.noted
    with engine.compress():
        loss = F.gelu(x * 1).sum()
    loss.backward()
    results[0].sum().backward()  # encoded now, though another step has begun since
    assert x.grad is not None


def _fail(*_: Any, **__: Any) -> None:
    raise MemoryError("no more")


def test_overloads_may_call_their_first_argument_self() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with ActMemEngine(bits=4, min_elements=0).compress():
        pooled = torch.ops.aten.max_pool2d_with_indices(self=x * 1, kernel_size=[2, 2])[0]
        loss = torch.ops.aten.hardtanh(self=pooled).sum()
    loss.backward()
    expected = torch.autograd.grad(F.hardtanh(F.max_pool2d(x, 2)).sum(), x)[0]
    assert torch.equal(x.grad, expected)
