"""The log-softmax of a large vocabulary: the largest tensor of a language model is stored once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine

TOKENS, VOCABULARY, WIDTH = 96, 1024, 16


class LanguageModel(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.embedding(ids)))


def shifted(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of Hugging Face's causal models: in float32, on a padded target."""
    targets = F.pad(ids, (0, 1), value=-100)[1:]
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.view(-1))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": F.cross_entropy,
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "shifted": shifted,
    "log softmax and its loss": lambda logits, ids: F.nll_loss(F.log_softmax(logits, -1), ids),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())
def test_stored_once(loss_of: Callable[[Tensor, Tensor], Tensor], autocast: bool) -> None:
    model, ids = LanguageModel(), torch.randint(VOCABULARY, (TOKENS,))
    stored: dict[int, int] = {}
    gradients: dict[int, Tensor] = {}
    for loss_bits in (32, 8):
        engine = ActMemEngine(bits=4, loss_bits=loss_bits)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), engine.compress(model, inputs=ids):
            loss = loss_of(model(ids), ids)
        activations = [row for row in engine.ledger.sites.values() if row.kind not in {"weight", "input"}]
        stored[loss_bits] = sum(row.saved_bytes for row in activations if row.saved_bytes >= TOKENS * VOCABULARY)
        (gradients[loss_bits],) = torch.autograd.grad(loss, model.head.weight)
    assert 0 < stored[32] <= 4 * TOKENS * VOCABULARY  # half of it where autocast takes the log-softmax in bfloat16
    assert stored[8] == TOKENS * VOCABULARY * (256 + 4) // 256
    torch.testing.assert_close(gradients[8], gradients[32], rtol=0.3, atol=3e-3)


def test_the_embedding_stores_nothing_of_its_own() -> None:
    model, ids = LanguageModel(), torch.randint(VOCABULARY, (TOKENS,))
    engine = ActMemEngine(bits=4)
    with engine.compress(model, inputs=ids):
        model(ids).sum()
    rows = [row for site, row in engine.ledger.sites.items() if site.layer == "embedding"]
    assert [(row.kind, row.codec) for row in rows] == [("input", "exact")]


class HingeLoss(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - 0.5).sum() + x.square().add(0.01).log().sum()


OTHER_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "probabilities": lambda x: F.binary_cross_entropy(x.clamp(1e-4, 1 - 1e-4), torch.full_like(x, 0.5)),
    "variance": lambda x: F.gaussian_nll_loss(x, torch.zeros_like(x), x + 1e-3),
    "rate": lambda x: F.poisson_nll_loss(x.abs() + 1e-3, torch.ones_like(x), log_input=False),
    "own": HingeLoss(),
}


@pytest.mark.parametrize("loss_of", OTHER_LOSSES.values(), ids=OTHER_LOSSES.keys())
def test_what_a_loss_divides_by_is_never_rounded(loss_of: Callable[[Tensor], Tensor]) -> None:
    """At 8 bits the gradient of a binary cross-entropy was once 1e9 times too large."""
    x = torch.rand(64, 64, requires_grad=True)
    model = nn.ModuleList([loss_of]) if isinstance(loss_of, nn.Module) else None
    with ActMemEngine(bits=8, loss_bits=8).compress(model):
        loss = loss_of(x * 1)
    packed, plain = (torch.autograd.grad(value, x)[0] for value in (loss, loss_of(x * 1)))
    assert float((packed - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize("probability", [torch.sigmoid, lambda x: (x - 8).clamp(max=0).exp()], ids=["sigmoid", "exp"])
@pytest.mark.parametrize("loss_of", [lambda y: F.binary_cross_entropy(y, torch.ones_like(y)), lambda y: -y.log().sum()])
def test_a_probability_is_the_same_in_its_own_backward_and_in_that_of_its_loss(
    probability: Callable[[Tensor], Tensor], loss_of: Callable[[Tensor], Tensor]
) -> None:
    """One of 1e-4 that is 1e-2 once it is rounded made the gradient 100 times too large: 1/y times y' (1 - y')."""
    x = (torch.randn(64, 64) * 5).requires_grad_()
    engine = ActMemEngine(bits=2)
    with engine.compress():
        loss = loss_of(probability(x * 1))
    assert engine.ledger.live_saved_bytes <= 2.1 * x.nbytes  # y once, and the target
    packed, plain = (torch.autograd.grad(value, x)[0] for value in (loss, loss_of(probability(x * 1))))
    assert float((packed - plain).norm() / plain.norm()) < 1e-6
