"""Products that save a contiguous copy of an argument: it follows from what is stored of the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine

BATCH, TOKENS, WIDTH = 16, 32, 64
BYTES = BATCH * TOKENS * WIDTH * 4


class Mixer(nn.Module):
    """Mixes tokens, two ways: a linear layer over the last dimension of a transposed tensor (MLP-Mixer)."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.first, self.second = nn.Linear(TOKENS, TOKENS), nn.Linear(TOKENS, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).transpose(1, 2)
        return self.first(y).sum() + self.second(y).sum()


def stored(model: nn.Module, x: Tensor, engine: ActMemEngine) -> tuple[dict[str, str], list[Tensor]]:
    """Return the codecs of the copies that layers save, and the gradients."""
    with engine.compress(model):
        loss = model(x * 1)
    codecs = {site.layer: row.codec for site, row in engine.ledger.sites.items() if str(site).endswith("linear.result")}
    return codecs, list(torch.autograd.grad(loss, [x, *model.parameters()]))


def inputs() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)


@pytest.mark.parametrize(
    ("norm", "codecs"),
    [(True, {"first": "derived", "second": "derived"}), (False, {"first": "uniform-4", "second": "derived"})],
)
def test_a_copy_follows_from_its_original_or_from_another_copy(norm: bool, codecs: dict[str, str]) -> None:
    engine = ActMemEngine(bits=4)
    assert stored(Mixer(norm), inputs(), engine)[0] == codecs
    copies = [row for site, row in engine.ledger.sites.items() if str(site).endswith("linear.result")]
    assert [row.raw_bytes for row in copies] == [BYTES, BYTES]  # plain autograd keeps both


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("settings", [{"derive": True}, {"derive": False}])
def test_gradients_are_those_of_plain_training(norm: bool, settings: dict[str, Any]) -> None:
    model, x = Mixer(norm), inputs()
    plain = torch.autograd.grad(model(x * 1), [x, *model.parameters()])
    _, packed = stored(model, x, ActMemEngine(bits=32, **settings))
    for ours, theirs in zip(packed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_change_of_the_original_after_the_copy_does_no_harm() -> None:
    """Plain autograd has its own copy; a recipe from an original that is kept by reference would notice, not forget."""
    layer, x = nn.Linear(TOKENS, TOKENS), inputs()

    def run() -> Tensor:
        h = x * 1
        first = layer(h.transpose(1, 2)).sum()
        h.add_(1.0)
        return first + 2 * layer(h.transpose(1, 2)).sum()

    plain = torch.autograd.grad(run(), [x, *layer.parameters()])
    for settings in ({"bits": 32, "derive": True}, {"bits": 8}):
        with ActMemEngine(**settings).compress(layer):
            loss = run()
        for ours, theirs in zip(torch.autograd.grad(loss, [x, *layer.parameters()]), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("weight_like_input", [False, True])
def test_a_computed_weight_of_the_inputs_size_is_not_taken_for_it(weight_like_input: bool) -> None:
    x = torch.randn(WIDTH, WIDTH, requires_grad=True)
    base = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def run() -> Tensor:
        weight = torch.tanh(base).t() if weight_like_input else torch.tanh(base)
        return F.linear((x * 1).t(), weight).square().sum()

    plain = torch.autograd.grad(run(), [x, base])
    with ActMemEngine(bits=32, derive=True, min_elements=0).compress():
        loss = run()
    for ours, theirs in zip(torch.autograd.grad(loss, [x, base]), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [7, 8])
def test_what_einsum_copies_is_permuted(tokens: int) -> None:
    """With as many tokens as heads the copy of the values has the shape of the values, and another order."""
    heads, width = 8, 32
    x = torch.randn(4, tokens, heads * width)
    weight = torch.randn(heads * width, heads * width).div_(16).requires_grad_()

    def run() -> Tensor:
        values = F.layer_norm(F.linear(x, weight), (heads * width,)).view(4, tokens, heads, width)
        scores = torch.einsum("bihd,bjhd->bhij", values.tanh(), values).mul(0.1 / width).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", scores, values).square().mean()

    (plain,) = torch.autograd.grad(run(), [weight])
    for settings, error in (({"bits": 32, "derive": True}, 1e-5), ({"bits": 8}, 0.1)):
        with ActMemEngine(min_elements=0, **settings).compress(inputs=[x]):
            loss = run()
        (found,) = torch.autograd.grad(loss, [weight])
        assert float((found - plain).norm() / plain.norm()) < error


def test_keywords_may_come_in_any_order() -> None:
    x, weight = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
    first = torch.randn(64, 64, requires_grad=True)

    def run() -> Tensor:
        hidden = F.linear(x, first).view(8, 8, 64).transpose(0, 1)
        return F.linear(weight=weight, input=hidden, bias=None).square().mean()

    plain = torch.autograd.grad(run(), [first, weight])
    with ActMemEngine(bits=32, derive=True, min_elements=0).compress():
        loss = run()
    for ours, theirs in zip(torch.autograd.grad(loss, [first, weight]), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
