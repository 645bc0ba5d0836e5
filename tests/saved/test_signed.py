"""Inputs of batch norms behind a ReLU: 2 bits in all, and none of them lost."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.saved.handle import Kept
from lightning_actmem.saved.signed import Sign
from tests import models

GROUP_BYTES = 256 // 8 + 4  # one bit each, a scale and a mean


class Norms(nn.Module):
    """Two batch norms on images [4, 16, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(16), nn.BatchNorm2d(16)


FLOWS = {
    "direct": (lambda m, x: F.relu(m.first(x * 1)), 1),
    "in place": (lambda m, x: F.relu_(m.first(x * 1)), 1),
    "sum": (lambda m, x: (lambda h: F.relu(m.first(h) + h))(x * 1), 1),
    "sum in place": (lambda m, x: F.relu_(m.first(x * 1).add_(m.second(x * 2))), 2),
    "channels last": (lambda m, x: F.relu(m.first((x * 1).contiguous(memory_format=torch.channels_last))), 1),
}
UNSIGNED = {
    "silu": lambda m, x: F.silu(m.first(x * 1)),
    "silu before relu": lambda m, x: (lambda y: F.silu(y) + F.relu(y))(m.first(x * 1)),
    "nothing": lambda m, x: m.first(x * 1),
    "scaled": lambda m, x: F.relu(m.first(x * 1) * 2),
}


def norm_rows(engine: ActMemEngine) -> dict[str, int]:
    """Return bytes by codec of what batch norms have saved of their inputs."""
    found: Counter[str] = Counter()
    for site, row in engine.ledger.sites.items():
        if (site.operation, site.role) == ("batch_norm", "input"):
            found[row.codec] += row.saved_bytes
    return dict(found)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("name", FLOWS)
def test_one_bit_beside_the_sign(name: str, x: Tensor) -> None:
    flow, norms = FLOWS[name]
    engine, m = ActMemEngine(bits=2, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        out = flow(m, x)
    groups = x.numel() // 256
    assert sum(norm_rows(engine).values()) == norms * groups * GROUP_BYTES
    assert set(norm_rows(engine)) == {"rotated-1"}
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", UNSIGNED)
def test_two_bits_without_a_relu(name: str, x: Tensor) -> None:
    engine, m = ActMemEngine(bits=2, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        out = UNSIGNED[name](m, x)
    assert norm_rows(engine) == {"rotated-2": x.numel() // 256 * (64 + 4)}
    out.sum().backward()


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 2, "codec": "uniform"}, {"bits": 2, "derive": False}])
def test_other_settings_do_not_wait(settings: dict[str, object], x: Tensor) -> None:
    engine, m = ActMemEngine(**settings, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        F.relu(m.first(x * 1))
    assert engine.report().waiting_bytes == 0
    assert "rotated-1" not in norm_rows(engine)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_and_back_changes_only_rounding(direct: bool, dtype: torch.dtype) -> None:
    """Also where a weight is negative, or 0, which leaves no way back from the norm's output."""
    x = (3 + 2 * torch.randn(4, 5, 7, 7)).to(dtype)
    mean, deviation = x.float().mean((0, 2, 3)), x.float().std((0, 2, 3))
    weight, bias = torch.tensor([1.0, -2.0, 0.0, 0.0, 1e-9]), torch.tensor([0.5, 0.3, 0.0, 1.0, 1.0])
    output = F.batch_norm(x.float(), mean, deviation**2, weight, bias, eps=0.0)
    handles = tuple(Kept(tensor) for tensor in (mean, 1 / deviation, weight, bias))
    sign = Sign(Kept(output > 0), x.shape, handles, direct)
    v = sign.fold(x)
    if direct:
        assert v[:, :2].min() >= -0.05  # the magnitude, where the norm's output has its sign
    restored = v.to(dtype)
    sign.unfold_(restored)
    torch.testing.assert_close(restored, x, rtol=0.02, atol=0.05)


def test_unbiased(x: Tensor) -> None:
    """The mean of 200 decodings comes as close to the tensor as their variance allows."""
    m, draws = Norms(), 200
    nn.init.uniform_(m.first.bias)
    engine = ActMemEngine(bits=2, min_elements=0)
    exact = x.detach()
    total, square = torch.zeros_like(exact), 0.0
    for _ in range(draws):
        with engine.compress(m, inputs=x):
            out = F.relu(m.first(x * 1))
        restored = out.grad_fn.next_functions[0][0]._saved_input.detach()
        total += restored
        square += float((restored - exact).square().mean())
    error = float((total / draws - exact).square().mean())
    assert 0.15 < square / draws < 0.3  # 0.57 of what the sign leaves of the variance, 0.36 to 0.45
    assert error < 2 * square / draws / draws


def test_waits_in_the_ledger_and_no_longer_than_the_forward_pass(x: Tensor) -> None:
    engine, m = ActMemEngine(bits=2, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        y = m.first(x * 1)
        gc.collect()
        assert engine.ledger.live_waiting_bytes == x.nbytes
    engine.ledger.settle()
    assert engine.ledger.live_waiting_bytes == 0
    assert engine.report().waiting_bytes == x.nbytes
    y.sum().backward()


def test_at_most_two_wait(x: Tensor) -> None:
    engine, m = ActMemEngine(bits=2, min_elements=0), nn.Sequential(*(nn.BatchNorm2d(16) for _ in range(5)))
    with engine.compress(m, inputs=x):
        m(x * 1)
    assert engine.report().waiting_bytes <= 3 * x.nbytes  # one more while it takes its place


def test_a_dropped_graph_frees_what_waits(x: Tensor) -> None:
    engine, m = ActMemEngine(bits=2, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        m.first(x * 1)
        engine.ledger.settle()
        assert engine.ledger.live_waiting_bytes == 0


def test_backward_inside_the_context(x: Tensor) -> None:
    engine, m = ActMemEngine(bits=2, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        m.first(x * 1).square().sum().backward()
    assert x.grad is not None


def test_a_change_in_place_while_it_waits_is_an_error_as_in_plain_autograd(x: Tensor) -> None:
    engine, m = ActMemEngine(bits=2, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        h = x * 1
        out = F.relu(m.first(h.add_(1)))
        with torch.no_grad():
            h.mul_(2)  # after the ReLU: stored already
    out.sum().backward()
    with engine.compress(m, inputs=x):
        h = x * 1
        out = m.first(h)
        with torch.no_grad():
            h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_plan_is_taken_literally(x: Tensor) -> None:
    engine, m = ActMemEngine(bits=2, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        F.relu(m.first(x * 1))
    (site,) = (site for site, row in engine.ledger.sites.items() if site.role == "input" and row.codec == "rotated-1")
    engine._store.plan = {site: engine._hooks._identifier._codecs.general}
    with engine.compress(m, inputs=x):
        F.relu(m.first(x * 1))
    assert set(norm_rows(engine)) == {"rotated-2"}


def test_relu_reads_its_sign_alone_and_others_the_values(x: Tensor) -> None:
    engine, m = ActMemEngine(bits=2, min_elements=0), Norms()
    with engine.compress(m, inputs=x):
        out = F.relu(m.first(x * 1))
        squared = out.square()
    sign, values = out.grad_fn._saved_result, squared.grad_fn._saved_self
    out = out.detach()
    assert torch.equal(sign, (out > 0).float())
    assert torch.equal(values.detach() != 0, out > 0)
    assert float((values.detach() - out).square().mean() / out.square().mean()) < 0.5


def test_resnet_step_is_repeatable() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model, images = models.ResNet((1, 1, 1, 1), width=8), torch.randn(4, 3, 32, 32)
        engine = ActMemEngine(bits=2)
        with engine.compress(model, inputs=images):
            loss = model(images).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    assert all(map(torch.equal, run(), run()))
