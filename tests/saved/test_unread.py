"""Tables of what backward does not read, checked against the installed torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_actmem import ActMemEngine
from lightning_actmem.saved.reduced import ONE_BIT, UNREAD

UNREAD_CASES: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        f"{kind}_pool{d}d": lambda x, kind=kind, d=d: getattr(F, f"{kind}_pool{d}d")(spatial(x, d), 2)
        for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
        for d in (1, 2, 3)
    },
    "gather": lambda x: x.gather(1, torch.arange(8).expand(8, 8)),
    "pad": lambda x: F.pad(spatial(x, 2), (1, 2, 3, 1), mode="reflect"),
    "pad by repetition": lambda x: F.pad(spatial(x, 2), (1, 2, 3, 1), mode="replicate"),
    "pad of volumes": lambda x: F.pad(spatial(x, 3), (1, 2, 3, 1, 0, 1), mode="reflect"),
    "nll_loss": lambda x: F.nll_loss(x, torch.arange(32), weight=torch.arange(1.0, 33.0)),
    "nll_loss of images": lambda x: F.nll_loss(
        spatial(x, 2), torch.ones(2, 16, 16, dtype=torch.long), reduction="none"
    ),
}
ONE_BIT_CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.9),
    "hardtanh in place": lambda x: F.hardtanh(x * 1, inplace=True),
    "hardtanh from above": lambda x: F.hardtanh(x, 0.0, float("inf")),
    "hardtanh from below": lambda x: F.hardtanh(x, -float("inf"), 0.9),
    "relu6": lambda x: F.relu6(4 * x),
    "hardsigmoid": lambda x: F.hardsigmoid(4 * x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu in place": lambda x: F.leaky_relu_(x * 1, 0.2),
    "threshold": lambda x: F.threshold(x, -0.3, 7.0),
    "clamp": lambda x: x.clamp(-0.3, 0.9),
    "clamp from above": lambda x: torch.clamp(x, max=0.9),
    "clamp from below": lambda x: torch.clamp(x, min=-0.3),
    "clip": lambda x: x.clip(-0.3, 0.9),
    "clamp_min": lambda x: x.clamp_min(-0.3),
    "clamp_max": lambda x: torch.clamp_max(x, 0.9),
}


def spatial(x: Tensor, dimensions: int) -> Tensor:
    """Return [2, 2, ...] with that many dimensions of size 4 or more."""
    return x.reshape(2, 2, *{1: (16 * 16,), 2: (16, 16), 3: (4, 8, 8)}[dimensions])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("name", UNREAD_CASES)
def test_backward_does_not_read_it(name: str, layout: str) -> None:
    """Put NaN where the tensor was: the gradient stays bit-equal."""
    case = UNREAD_CASES[name]
    x = torch.randn(32, 32, requires_grad=True)
    if layout == "channels last" and name.endswith("2d"):

        def case(x: Tensor) -> Tensor:
            return getattr(F, name)(spatial(x, 2).contiguous(memory_format=torch.channels_last), 2)

    def with_nan(saved: Tensor) -> Tensor:
        return torch.full((), float("nan")).expand(saved.shape) if saved.requires_grad else saved

    with torch.autograd.graph.saved_tensors_hooks(with_nan, lambda t: t):
        out = case(x * 1)
    weight = torch.randn(out.shape)
    (expected,) = torch.autograd.grad(case(x * 1), x, weight)
    assert torch.equal(torch.autograd.grad(out, x, weight)[0], expected)


def test_every_entry_of_the_tables_has_a_case() -> None:
    assert {name.removesuffix("_with_indices") for name in UNREAD} == {name.split()[0] for name in UNREAD_CASES}
    assert set(ONE_BIT) == {name.split()[0] for name in ONE_BIT_CASES}


@pytest.mark.parametrize("name", [*UNREAD_CASES, *ONE_BIT_CASES])
def test_gradients_are_bit_equal_and_bytes_are_few(name: str) -> None:
    case = {**UNREAD_CASES, **ONE_BIT_CASES}[name]
    x = torch.randn(32, 32).mul_(2).requires_grad_()
    engine = ActMemEngine(bits=32, derive=True, min_elements=0)
    with engine.compress():
        loss = (case(x * 1) * torch.ones(())).sum()
    packed = torch.autograd.grad(loss, x)[0]
    assert torch.equal(packed, torch.autograd.grad(case(x * 1).sum(), x)[0])
    row = next(
        row for site, row in engine.ledger.sites.items() if site.operation == name.split()[0] and row.kind != "index"
    )
    assert row.saved_bytes == (32 * 32 // 8 if name in ONE_BIT_CASES else 0)
    assert row.raw_bytes >= 32 * 32 * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.3, 0.9])
@pytest.mark.parametrize("name", ONE_BIT_CASES)
def test_one_bit_agrees_at_the_edges(name: str, value: float) -> None:
    x = torch.full((64,), value, requires_grad=True)
    with ActMemEngine(bits=4, min_elements=0).compress():
        loss = ONE_BIT_CASES[name](x * 1).sum()
    expected = torch.autograd.grad(ONE_BIT_CASES[name](x * 1).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0].nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize(
    "case",
    [
        lambda x: F.hardtanh(x, 0.999, 1.005),
        lambda x: x.clamp(torch.full((32,), -0.5), torch.full((32,), 0.5)),
        lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=x.dtype)),
        lambda x: x.abs(),
    ],
    ids=["narrow", "tensor bounds", "prelu", "abs"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_told_by_one_bit_stays_exact(case: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(32, 32).to(dtype).requires_grad_()
    with ActMemEngine(bits=2, min_elements=0).compress():
        loss = case(x * 1).sum()
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(case(x * 1).sum(), x)[0])
