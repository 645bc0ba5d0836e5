"""Sigmoid, tanh and exp before something that divides: their results stay as they are, and no others do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine

SIZE = 64, 32
#: At 8 bits, of what does not divide; what did was off by 10 to 10^7.
ROUNDING = 1e-3

Program = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def gan(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return -torch.log(1 - torch.sigmoid(layer(x)) + 1e-8).mean()


def squashed(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.log(1 - torch.tanh(layer(x) / 2).pow(2) + 1e-6).mean()


def clamped(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(layer(x)).clamp(1e-7, 1 - 1e-7), targets())


def chosen(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Fewer than `min_elements` of them."""
    return F.binary_cross_entropy(torch.sigmoid(layer(x))[targets() > 0], torch.ones(int(targets().sum())))


def cast(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(layer(x).bfloat16()).float(), targets())


def variance(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return F.gaussian_nll_loss(layer(x), x, torch.exp(layer(-x)))


def one_over(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (1 / (1 + torch.exp(-layer(x)))).mean()


def second_of_two(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Both networks run before the loss of the first."""
    real, fake = torch.sigmoid(layer(x)), torch.sigmoid(layer(-x))
    return -(torch.log(real + 1e-8) + torch.log(1 - fake + 1e-8)).mean()


def long_ago(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """It is encoded by then: the code gives way to what the logarithm keeps."""
    first = torch.sigmoid(layer(x))
    others = sum(torch.sigmoid(layer(-x)).mean() for _ in range(4))
    return others - torch.log(first).mean()


PROGRAMS = [gan, squashed, clamped, chosen, cast, variance, one_over, second_of_two, long_ago]


def targets() -> Tensor:
    return (torch.arange(SIZE[0] * SIZE[1]).view(SIZE) % 3 == 0).float()


def run(program: Program, engine: ActMemEngine | None, scale: float = 6.0) -> Tensor:
    torch.manual_seed(0)
    layer, x = nn.Linear(SIZE[1], SIZE[1]), torch.randn(SIZE)
    with torch.no_grad():
        layer.weight.mul_(scale)  # outputs far from 0, as of a trained net
    if engine is None:
        loss = program(layer, x)
    else:
        with engine.compress(layer, inputs=x):
            loss = program(layer, x)
    loss.backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("derive", [True, False])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_what_divides_meets_the_same_result(program: Program, derive: bool) -> None:
    assert error(run(program, ActMemEngine(bits=8, derive=derive)), run(program, None)) < ROUNDING


def test_the_ledger_has_it_exact_once_and_lets_it_go() -> None:
    engine = ActMemEngine(bits=4)
    layer, x = nn.Linear(SIZE[1], SIZE[1]), torch.randn(SIZE)
    with engine.compress(layer, inputs=x):
        loss = gan(layer, x)
    (row,) = (row for site, row in engine.ledger.sites.items() if site.operation == "sigmoid")
    assert (row.codec, row.saved_bytes, row.raw_bytes) == ("exact", x.nbytes, x.nbytes)
    engine.ledger.settle()
    assert engine.ledger.live_waiting_bytes == 0
    assert engine.ledger.live_saved_bytes == engine.report().stored_bytes
    loss.backward()
    del loss
    engine.ledger.settle()
    assert (engine.ledger.live_saved_bytes, engine.ledger.live_raw_bytes) == (0, 0)


def test_a_code_that_gives_way_is_taken_back() -> None:
    engine = ActMemEngine(bits=4)
    layer, x = nn.Linear(SIZE[1], SIZE[1]), torch.randn(SIZE)
    with engine.compress(layer, inputs=x):
        loss = long_ago(layer, x)
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == engine.report().stored_bytes
    del loss
    engine.ledger.settle()
    assert (engine.ledger.live_saved_bytes, engine.ledger.live_raw_bytes) == (0, 0)


def test_before_layers_reductions_and_other_losses_they_are_packed() -> None:
    """At most two of them wait at their full size."""
    engine = ActMemEngine(bits=4)
    layer, x = nn.Linear(SIZE[1], SIZE[1]), torch.randn(SIZE)
    with engine.compress(layer, inputs=x):
        hidden = x
        for activation in (torch.tanh, torch.sigmoid, torch.tanh, torch.sigmoid):
            hidden = activation(layer(hidden))
            engine.ledger.settle()
            assert engine.ledger.live_waiting_bytes <= 2 * x.nbytes
        loss = (hidden * x).sum() + torch.log(torch.exp(hidden).sum())
    rows = [row for site, row in engine.ledger.sites.items() if site.operation in ("tanh", "sigmoid", "exp")]
    assert {row.codec for row in rows} == {"uniform-4", "derived"}  # exp follows from its input
    loss.backward()


def test_changed_in_place_while_it_waits_is_the_error_of_plain_autograd() -> None:
    layer, x = nn.Linear(SIZE[1], SIZE[1]), torch.randn(SIZE)
    with ActMemEngine(bits=4).compress(layer, inputs=x):
        result = torch.sigmoid(layer(x))
        result.mul_(2)
        loss = result.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_twice_backward_gives_the_same() -> None:
    layer, x = nn.Linear(SIZE[1], SIZE[1]), torch.randn(SIZE)
    for program in (gan, long_ago):
        with ActMemEngine(bits=4).compress(layer, inputs=x):
            loss = program(layer, x)
        first, second = (torch.autograd.grad(loss, layer.weight, retain_graph=True) for _ in range(2))
        assert torch.equal(*first, *second)
