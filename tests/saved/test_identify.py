"""What is packed and what is not: every disguise that a weight, an attention or a loss may wear."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine

WIDTH = 32


class Tiny(nn.Module):
    """Weights for the cases below."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, 3 * WIDTH).requires_grad_(False)
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.randn(64, WIDTH))
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.embedding = nn.Embedding(10, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.bn = nn.BatchNorm2d(2)
        self.mha = nn.MultiheadAttention(WIDTH, 4, batch_first=True, dropout=0.1)
        self.register_buffer("table", torch.rand(64, WIDTH))


@dataclass(frozen=True)
class Case:
    """A step and the kinds of tensors it must save, by operation."""

    name: str
    step: Callable[[Tiny, Tensor], Tensor]
    kinds: dict[str, set[str]]
    autocast: bool = False


def hidden(x: Tensor) -> Tensor:
    """Return an activation that saves nothing itself: rows of width WIDTH with gradient."""
    return x + torch.zeros(1, requires_grad=True)


def image(x: Tensor) -> Tensor:
    return hidden(x).view(4, 2, 16, -1)


def attention(model: Tiny, x: Tensor) -> Tensor:
    h = hidden(x).view(2, 32, WIDTH)
    scores = (h @ (h + 1).transpose(1, 2)).softmax(-1)
    return F.dropout(scores, 0.5) @ (h + 2)


CASES = [
    Case("linear", lambda m, x: m.fc(hidden(x)), {"linear": {"packed", "weight"}}),
    Case("first layer reads the batch", lambda m, x: m.fc(x), {"linear": {"input"}}),
    Case("transposed", lambda m, x: hidden(x) @ m.fc.weight.t(), {"matmul": {"packed", "weight"}}),
    Case("tied", lambda m, x: hidden(x) @ m.embedding.weight.t(), {"matmul": {"packed", "weight"}}),
    Case(
        "chunked",
        lambda m, x: sum(F.linear(hidden(x), w) for w in m.qkv.chunk(3)),  # type: ignore[return-value]
        {"linear": {"packed", "weight"}},
    ),
    Case("frozen", lambda m, x: m.frozen(hidden(x)), {"linear": {"weight"}}),
    Case("autocast", lambda m, x: m.fc(hidden(x)), {"linear": {"packed", "weight"}}, autocast=True),
    Case("autocast, frozen", lambda m, x: m.frozen(hidden(x)), {"linear": {"weight"}}, autocast=True),
    Case("autocast, conv", lambda m, x: m.conv(image(x)), {"conv2d": {"packed", "weight"}}, autocast=True),
    Case(
        "computed weight",
        lambda m, x: F.linear(hidden(x), m.fc.weight * 2),
        {"linear": {"packed", "exact"}, "mul": set()},
    ),
    Case("weight as a factor", lambda m, x: hidden(x) * m.scale, {"mul": {"packed", "weight"}}),
    Case("buffer as a factor", lambda m, x: hidden(x) * m.table, {"mul": {"buffer"}}),
    Case("constant as a factor", lambda m, x: hidden(x) * torch.rand(64, WIDTH), {"mul": {"constant"}}),
    Case(
        "broadcast factor",
        lambda m, x: hidden(x) * hidden(x[:2].clone()).mean(0).expand(1, -1),
        {"mul": {"packed", "statistic"}},
    ),
    Case("features of frozen layers", lambda m, x: m.fc(x * 2), {"linear": {"packed"}}),
    Case("norm", lambda m, x: m.norm(hidden(x)), {"layer_norm": {"packed", "weight", "statistic"}}),
    Case("batch norm", lambda m, x: m.bn(image(x)), {"batch_norm": {"packed", "weight", "buffer", "statistic"}}),
    Case("gelu", lambda m, x: F.gelu(hidden(x)), {"gelu": {"packed"}}),
    Case("relu", lambda m, x: F.relu(hidden(x)), {"relu": {"packed"}}),
    Case("relu in place", lambda m, x: hidden(x).relu_(), {"relu": {"packed"}}),
    Case("operators", lambda m, x: (hidden(x) * hidden(x)) ** 2, {"mul": {"packed"}, "pow": {"packed"}}),
    Case("dropout", lambda m, x: F.dropout(hidden(x), 0.5), {"dropout": {"packed"}}),
    Case("alpha dropout", lambda m, x: F.alpha_dropout(hidden(x), 0.5, True), {"alpha_dropout": {"packed"}}),
    Case("bool mask", lambda m, x: torch.where(x > 0, hidden(x), 0.0), {"where": {"packed"}}),
    Case("max pool", lambda m, x: F.max_pool2d(image(x), 2), {"max_pool2d": {"packed", "unread"}}),
    Case("leaky relu", lambda m, x: F.leaky_relu(hidden(x)), {"leaky_relu": {"packed"}}),
    Case("sort", lambda m, x: hidden(x).sort(dim=1).values, {"sort": {"packed"}}),
    Case("index", lambda m, x: m.embedding(torch.arange(64) % 10), {"embedding": {"index"}}),
    Case("eager attention", attention, {"matmul": {"attention"}, "softmax": {"attention"}, "dropout": {"packed"}}),
    Case(
        "sdpa",
        lambda m, x: F.scaled_dot_product_attention(*[hidden(x).view(1, 2, 32, WIDTH) + i for i in range(3)]),
        {"scaled_dot_product_attention": {"attention"}},
    ),
    Case(
        "mha",
        lambda m, x: m.mha(*[hidden(x).view(2, 32, WIDTH) + i for i in range(3)])[0],
        {"linear": {"packed", "weight"}, "softmax": {"attention"}, "dropout": {"packed"}},
    ),
    Case("cross entropy", lambda m, x: F.cross_entropy(hidden(x), x.argmax(1)), {"cross_entropy": {"loss", "index"}}),
    Case("mse", lambda m, x: F.mse_loss(hidden(x), x), {"mse_loss": {"loss", "input"}}),
    Case("log softmax", lambda m, x: F.log_softmax(hidden(x), 1), {"log_softmax": {"loss"}}),
    Case("division", lambda m, x: hidden(x) / hidden(x), {"div": {"exact"}}),
    Case("square root", lambda m, x: hidden(x).abs().sqrt(), {"sqrt": {"exact"}, "abs": {"exact"}}),
    Case("root as a power", lambda m, x: hidden(x).abs() ** 0.5, {"pow": {"exact"}}),
    Case("float64", lambda m, x: F.gelu(hidden(x.double())), {"gelu": {"unsupported"}}),
    Case("leaf with gradient", lambda m, x: F.gelu(x.clone().requires_grad_()), {"gelu": {"input"}}),
    Case("rrelu", lambda m, x: F.rrelu(hidden(x), training=True), {"rrelu": {"unsupported"}}),
]


def saved_kinds(case: Case, **config: Any) -> tuple[dict[str, set[str]], ActMemEngine]:
    model, x = Tiny(), torch.randn(64, WIDTH)
    engine = ActMemEngine(min_elements=0, **config)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast), engine.compress(model, inputs=x):
        out = case.step(model, x)
    if out.requires_grad:
        out.sum().backward()
    kinds: dict[str, set[str]] = {}
    for site, row in engine.ledger.sites.items():
        kinds.setdefault(site.operation, set()).add(row.kind)
    return kinds, engine


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kinds(case: Case) -> None:
    kinds, _ = saved_kinds(case)
    for operation, expected in case.kinds.items():
        assert kinds.get(operation, set()) == expected, kinds


def codec_of(case_name: str, operation: str, **config: Any) -> set[str]:
    case = next(case for case in CASES if case.name == case_name)
    _, engine = saved_kinds(case, **config)
    return {row.codec for site, row in engine.ledger.sites.items() if site.operation == operation}


@pytest.mark.parametrize(
    ("case", "operation", "codecs"),
    [
        ("relu", "relu", {"relu-4"}),
        ("relu in place", "relu", {"relu-4"}),
        ("bool mask", "where", {"mask-1"}),
        ("dropout", "dropout", {"two_valued-1"}),
        ("alpha dropout", "alpha_dropout", {"two_valued-1"}),
        ("max pool", "max_pool2d", {"nothing", "window-4"}),
        ("leaky relu", "leaky_relu", {"mask-1"}),
        ("sort", "sort", {"integer-8"}),
        ("gelu", "gelu", {"uniform-4"}),
    ],
)
def test_codecs(case: str, operation: str, codecs: set[str]) -> None:
    assert codec_of(case, operation) == codecs


def test_relu_outputs_take_two_bits_when_one_is_asked() -> None:
    assert codec_of("relu", "relu", bits=1) == {"relu-2"}


@pytest.mark.parametrize("codec", ["uniform", "rotated"])
def test_relu_outputs_keep_their_own_code(codec: str) -> None:
    """With a dithered or rotated zero half of the blocked gradient would pass."""
    assert codec_of("relu", "relu", codec=codec) == {"relu-4"}
    assert codec_of("gelu", "gelu", codec=codec) == {f"{codec}-4"}


def test_without_inputs_a_tensor_without_gradient_is_taken_for_one() -> None:
    model, x = Tiny(), torch.randn(64, WIDTH)
    engine = ActMemEngine(min_elements=0)
    with engine.compress(model):
        model.fc(x * 2)
    assert set(engine.report().bytes_by_kind) == {"input"}


def test_everything_in_a_loss_module_stays_exact() -> None:
    class HuberishLoss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * x).sum()

    model, x = nn.Sequential(HuberishLoss()), torch.randn(64, WIDTH)
    engine = ActMemEngine(min_elements=0)
    with engine.compress(model, inputs=x):
        model(hidden(x))
    assert set(engine.report().bytes_by_kind) == {"loss"}


def test_roles_name_the_argument() -> None:
    _, engine = saved_kinds(next(case for case in CASES if case.name == "autocast"))
    assert {(str(site)) for site in engine.ledger.sites} == {"fc/linear.input", "fc/linear.weight"}


def test_an_argument_itself_comes_before_others_that_share_its_memory() -> None:
    engine = ActMemEngine(min_elements=0)
    with engine.compress():
        h = hidden(torch.randn(64, WIDTH))
        h.view_as(h) * h
    roles = {site.role for site in engine.ledger.sites if site.operation == "mul"}
    assert {"input", "other"} <= roles


@pytest.mark.parametrize(
    ("patterns", "exact"),
    [
        (("norm",), {"norm"}),
        (("op:gelu",), {""}),
        (("n*",), {"norm"}),
        (("*",), {"norm", "", "deep.1"}),
        (("deep",), {"deep.1"}),
        (("deep.0", "nor"), set()),
    ],
)
def test_patterns_keep_layers_and_operations_exact(patterns: tuple[str, ...], exact: set[str]) -> None:
    model = Tiny()
    model.deep = nn.Sequential(nn.Identity(), nn.LayerNorm(WIDTH))
    engine = ActMemEngine(min_elements=0, exact=patterns)
    with engine.compress(model):
        F.gelu(model.deep(model.norm(hidden(torch.randn(64, WIDTH)))))
    kinds = {site.layer: row.kind for site, row in engine.ledger.sites.items() if site.role == "input"}
    assert {layer for layer, kind in kinds.items() if kind == "excluded"} == exact
    assert {layer for layer, kind in kinds.items() if kind == "packed"} == {"norm", "", "deep.1"} - exact


def test_what_a_place_has_saved_before_does_not_decide_for_other_tensors() -> None:
    """The verdict on an activation is looked up by operation, role and layer: other tensors there have their own."""
    x = torch.randn(64, WIDTH, requires_grad=True)
    factors = {
        "packed": x.exp(),
        "statistic": x.mean(1, keepdim=True).exp(),
        "input": x.detach().exp().requires_grad_(),
        "constant": x.detach().abs(),
    }
    engine = ActMemEngine(min_elements=0, derive=False)
    with engine.compress(inputs=x):
        h = x.sin()
        for factor in (*factors.values(), factors["packed"]):
            h = h * factor
    kinds = [row.kind for site, row in engine.ledger.sites.items() if (site.operation, site.role) == ("mul", "other")]
    assert kinds == [*factors, "packed"]


def test_the_history_of_a_computed_result_is_left_alone() -> None:
    """Reading ``grad_fn`` made an object for every tensor saved, which autograd kept as long as the graph."""

    def nodes() -> int:
        return sum(type(thing).__name__ == "TanhBackward0" for thing in gc.get_objects())

    x = torch.randn(8, requires_grad=True)
    before = nodes()
    with ActMemEngine(bits=32).compress():
        y = x.tanh().tanh()
        assert nodes() == before
    y.sum().backward()
