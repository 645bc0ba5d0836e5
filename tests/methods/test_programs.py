"""Random programs of element-wise operations have the gradient of plain autograd, whatever is reused or dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_actmem import ActMemEngine

OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.tanh(x),
    lambda x, y: F.gelu(x),
    lambda x, y: torch.sigmoid(x) * y,
    lambda x, y: x * y,
    lambda x, y: x + y,
    lambda x, y: x - 0.5 * y,
    lambda x, y: 1 - x,
    lambda x, y: x * x,
    lambda x, y: x.square() * 0.1,
    lambda x, y: torch.sin(x) * 2,
    lambda x, y: torch.pow(torch.tanh(x), 3),
    lambda x, y: x.clone(),
    lambda x, y: x.flip(0),
    lambda x, y: x * 0.9 + y.mean(),
    lambda x, y: F.gelu(x).mul_(1.1),
    lambda x, y: x.detach() * y,
)
Program = list[tuple[int, int, int, int]]
SLOTS = 3
HUGE = 1e12  # where squares of squares lead; beyond, float64 no longer has the digits
PROGRAMS = st.lists(
    st.tuples(
        st.integers(0, len(OPERATIONS) - 1), *(st.integers(0, SLOTS - 1) for _ in range(2)), st.integers(0, SLOTS - 1)
    ),
    min_size=1,
    max_size=14,
)


def run(program: Program, roots: tuple[Tensor, ...]) -> Tensor:
    """Run the program on a few slots, each step overwriting one: what was there is dropped."""
    slots = [roots[0] * 1, roots[1] * 1, roots[0] + roots[1]]
    for operation, first, second, target in program:
        slots[target] = OPERATIONS[operation](slots[first], slots[second])
    return torch.stack([slot.sum() for slot in slots]).sum()


@settings(max_examples=120)
@given(PROGRAMS)
def test_the_gradient_is_that_of_plain_autograd(program: Program) -> None:
    random = torch.Generator().manual_seed(len(program))
    roots = tuple(torch.randn(40, 30, dtype=torch.float64, generator=random).requires_grad_() for _ in range(2))
    plain = run(program, roots)
    engine = ActMemEngine(bits=32, activations="derivative")
    with engine.compress():
        packed = run(program, roots)
    expected, found = (torch.autograd.grad(loss, roots, allow_unused=True) for loss in (plain, packed))
    assume(all(grad is None or float(grad.abs().max()) < HUGE for grad in expected))
    torch.testing.assert_close(packed, plain)
    for e, f in zip(expected, found, strict=True):
        assert (e is None) == (f is None)
        if e is not None and f is not None:
            scale = float(e.abs().max())
            assert float((e - f).abs().max()) <= 1e-9 * scale + 1e-12
    del plain, packed
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == engine.ledger.live_raw_bytes == 0


@settings(max_examples=40)
@given(PROGRAMS)
def test_rounded_it_is_finite_and_nothing_stays_behind(program: Program) -> None:
    roots = tuple(torch.randn(40, 30).requires_grad_() for _ in range(2))
    engine = ActMemEngine(bits=2, activations="derivative")
    with engine.compress():
        loss = run(program, roots)
    grads = torch.autograd.grad(loss, roots, allow_unused=True)
    assert float(loss.detach().abs()) > HUGE or all(grad is None or bool(grad.isfinite().all()) for grad in grads)
    del loss
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == engine.ledger.live_raw_bytes == 0
