"""The engine in plain PyTorch: savings, statistics of the gradient, and what it must not touch."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_actmem import ActMemConfig, ActMemEngine, ActMemError, ActMemWarning
from tests import models


def top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def classification(model: nn.Module, x: Tensor, classes: int) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % classes)


def run(
    model: nn.Module, step: Callable[[], Tensor], inputs: Any, autocast: bool = False, **config: Any
) -> ActMemEngine:
    engine = ActMemEngine(**config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), engine.compress(model, inputs=inputs):
        loss = step()
    loss.backward()
    return engine


# ---------------------------------------------------------------- savings


@pytest.mark.parametrize("derive", [False, True])
@pytest.mark.parametrize(("autocast", "ratio"), [(False, 7.0), (True, 3.5)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["resnet50", "mlp"])
def test_stored_activation_bytes(name: str, autocast: bool, ratio: float, derive: bool) -> None:
    if name == "resnet50":
        model: nn.Module = models.ResNet()
        x = torch.randn(2, 3, 128, 128)
    else:
        model, x = models.mlp(), torch.randn(2048, 128)
    engine = run(model, lambda: classification(model, x, 10), x, autocast, bits=4, derive=derive)
    report = engine.report()
    assert report.raw_bytes >= ratio * report.saved_bytes
    raw, saved = report.bytes_by_kind["packed"]
    assert raw >= ratio * saved
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == 0


@pytest.mark.parametrize(("autocast", "ratio"), [(False, 7.0), (True, 3.5)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [models.gpt2, models.bert])
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers on its own defaults
def test_what_is_packed_of_a_transformer(
    build: Callable[[str], nn.Module], attention: str, autocast: bool, ratio: float
) -> None:
    model = build(attention)
    ids = torch.randint(0, 256, (4, 128))
    labels = ids if build is models.gpt2 else torch.zeros(4, dtype=torch.long)
    engine = run(model, lambda: model(input_ids=ids, labels=labels).loss, (ids, labels), autocast, bits=4, derive=False)
    kinds = engine.report().bytes_by_kind
    raw, saved = kinds["packed"]
    assert raw >= ratio * saved
    for kind in ("attention", "weight"):  # reported beside it, in full: without derivation it has to stay exact
        assert kinds[kind][0] == kinds[kind][1] > 0
    assert ("loss" in kinds) == (build is models.gpt2)  # BERT's two-class loss is too small to be more than "small"
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == 0


def test_raw_bytes_are_what_plain_autograd_keeps_alive() -> None:
    """Count the storages that plain autograd holds, with hooks that change nothing."""
    model, x = models.mlp(), torch.randn(256, 128)
    owned = {t.untyped_storage()._cdata for t in [*model.parameters(), x]}
    alive: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in owned:
            alive[t.untyped_storage()._cdata] = t.detach()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        classification(model, x, 10)
    plain_bytes = sum(t.untyped_storage().nbytes() for t in alive.values())
    report = run(model, lambda: classification(model, x, 10), x, bits=4).report()
    assert report.raw_bytes == plain_bytes


# ---------------------------------------------------------------- statistics


def draw_errors(draws: int, **config: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean and variance of the weight gradient's error over many draws, and its inputs x and g."""
    torch.manual_seed(2)
    fc = nn.Linear(64, 4, bias=False)
    x = torch.randn(16, 64, requires_grad=True)
    grad_out = torch.randn(16, 4)
    exact = grad_out.t() @ x.detach()
    engine = ActMemEngine(bits=2, min_elements=0, **config)
    total, squares = torch.zeros(4, 64, dtype=torch.float64), torch.zeros(4, 64, dtype=torch.float64)
    for _ in range(draws):
        with engine.compress(fc):
            out = fc(x * 1)
        (grad,) = torch.autograd.grad(out, fc.weight, grad_out)
        error = (grad - exact).double()
        total += error
        squares += error**2
    return total / draws, (squares - total**2 / draws) / (draws - 1), x.detach(), grad_out


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
def test_the_gradient_of_a_packed_linear_layer(rounding: str) -> None:
    """Unbiased over 4,096 draws, with the variance of the closed form.

    With subtractive dither the error of each element is uniform on a step and independent of the input, so
    Var[dW[o, c]] = sum_r g[r, o]^2 step(r, c)^2 / 12; with stochastic rounding it is step^2 f (1 - f).
    """
    draws, group = 4096, 32
    mean, variance, x, grad_out = draw_errors(draws, codec="uniform", group_size=group, rounding=rounding)
    assert (mean / (variance / draws).sqrt()).abs().max() < 5

    groups = x.double().view(16, 2, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = ((high - low) / 3).expand_as(groups)
    fraction = ((groups - low) / step).frac()
    error_variance = step**2 / 12 if rounding == "dither" else step**2 * fraction * (1 - fraction)
    closed_form = (grad_out.double() ** 2).t() @ error_variance.reshape(16, 64)
    assert variance.sum() == pytest.approx(closed_form.sum().item(), rel=0.03)


@pytest.mark.slow
def test_the_gradient_of_a_linear_layer_packed_with_rotation() -> None:
    """Half the variance of dithered min-max groups, at a bias that does not count.

    One random Hadamard transform is not a uniformly random rotation, for which the scale would make the result exactly
    unbiased.
    """
    draws = 2048
    mean, variance, _, _ = draw_errors(draws, codec="rotated")
    squared_bias = (mean**2 - variance / draws).sum()
    assert squared_bias < 1e-3 * variance.sum()
    _, min_max, _, _ = draw_errors(256, codec="uniform")
    assert variance.sum() < 0.6 * min_max.sum()


# ---------------------------------------------------------------- what must not change


def train(config: dict[str, Any] | None, steps: int = 10, autocast: bool = False) -> list[Tensor]:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1568, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = ActMemEngine(**config) if config is not None else None
    for _ in range(steps):
        x, y = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
        around = contextlib.nullcontext() if engine is None else engine.compress(model, inputs=(x, y))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), around:
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*model.state_dict().values()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [{"bits": 32}, {"codec": "identity"}], ids=str)
def test_lossless_training_is_bit_equal(config: dict[str, Any], autocast: bool) -> None:
    for plain, packed in zip(train(None, 50, autocast), train(config, 50, autocast), strict=True):
        assert torch.equal(plain, packed)


def test_a_seed_determines_the_run() -> None:
    first, again, other = (train({"bits": 2, "seed": seed}) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_ranks_and_steps_have_noise_of_their_own() -> None:
    fc, x = nn.Linear(64, 64), torch.randn(64, 64)

    def weight_gradient(engine: ActMemEngine) -> Tensor:
        with engine.compress(fc):
            out = fc(x.requires_grad_() * 1).sum()
        return torch.autograd.grad(out, fc.weight)[0]

    one, other = ActMemEngine(bits=2), ActMemEngine(bits=2)
    other.rank = 1
    gradients = [weight_gradient(one), weight_gradient(one), weight_gradient(other)]
    assert len({g.sum().item() for g in gradients}) == 3
    resumed = ActMemEngine(bits=2)
    resumed.load_state_dict({"version": 1, "step": 1})
    assert torch.equal(weight_gradient(resumed), gradients[1])


def test_the_users_random_streams_are_untouched() -> None:
    states = [lambda: torch.get_rng_state().tolist(), random.getstate, lambda: np.random.get_state()[1].tolist()]
    model, x = models.mlp(), torch.randn(256, 128)
    before = [state() for state in states]
    run(model, lambda: classification(model, x, 10), x, bits=2)
    assert [state() for state in states] == before


def test_the_model_is_untouched() -> None:
    model, x = models.ResNet((1, 1), width=8, classes=10), torch.randn(2, 3, 64, 64)
    attributes = [set(vars(module)) for module in model.modules()]
    run(model, lambda: classification(model, x, 10), x, bits=2)
    assert [set(vars(module)) for module in model.modules()] == attributes


class NoSync(TorchDispatchMode):
    """Fails on the operations that make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2"}, name
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation() -> None:
    model, x = models.ResNet((1, 1), width=8, classes=10), torch.randn(4, 3, 64, 64)
    labels = torch.zeros(4, dtype=torch.long)
    engine = ActMemEngine(bits=4, min_elements=0)
    with NoSync():
        with engine.compress(model, inputs=(x, labels)):
            loss = F.cross_entropy(F.dropout(model(x), 0.5), labels)
        loss.backward()
    assert {"packed", "loss"} <= set(engine.report().bytes_by_kind)


def test_nothing_is_left_behind_after_an_exception() -> None:
    model = models.mlp()
    engine = ActMemEngine()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), engine.compress(model):
            raise error
    assert top_hooks() is None
    with engine.compress(model):  # and it works again
        assert top_hooks() is not None


def test_a_nested_context_is_one() -> None:
    engine = ActMemEngine(min_elements=0)
    x = torch.randn(64, 64, requires_grad=True)
    with engine.compress(), engine.compress():
        loss = F.gelu(x * 1).sum()
        hooks = top_hooks()
    assert hooks is not None
    assert engine.step == 1
    assert engine.report().bytes_by_kind["packed"] == (16384, 64 * 64 // 2 + 16 * 4)
    loss.backward()


def test_two_engines_pack_once() -> None:
    outer, inner = ActMemEngine(min_elements=0), ActMemEngine(min_elements=0)
    with outer.compress(), inner.compress():
        F.gelu(torch.randn(64, 64, requires_grad=True) * 1)
    assert (outer.report().stored_bytes, inner.report().stored_bytes > 0) == (0, True)


def test_hooks_left_open_inside_stay_where_they_are() -> None:
    """Autograd pops hooks by position: leaving ours from under others must not remove theirs."""
    theirs = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with ActMemEngine().compress():
        theirs.__enter__()
    assert top_hooks()[0] is theirs.pack_hook
    theirs.__exit__()
    assert top_hooks() is None


def test_torch_func_fails_with_the_remedy() -> None:
    engine = ActMemEngine()
    with pytest.raises(ActMemError, match=r"with engine\.paused\(\)"), engine.compress():
        torch.func.grad(lambda x: x.sin())(torch.tensor(1.0))


def test_torch_func_works_while_paused() -> None:
    engine = ActMemEngine(min_elements=0)
    x = torch.randn(64, 64, requires_grad=True)
    with engine.compress():
        with engine.paused():
            assert top_hooks() is None
            assert torch.func.grad(lambda x: x.sin())(torch.tensor(0.0)) == 1
            F.gelu(x * 1)
        F.gelu(x * 1)
    assert [row.tensors for row in engine.ledger.sites.values()] == [1]


def test_pause_outside_and_under_other_hooks_changes_nothing() -> None:
    engine = ActMemEngine()
    with engine.paused():
        assert top_hooks() is None
    theirs = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with engine.compress(), theirs, engine.paused():
        assert top_hooks()[0] is theirs.pack_hook


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_inside_packs_the_inputs_of_each_segment(use_reentrant: bool) -> None:
    model, x = models.mlp(), torch.randn(256, 128)
    inputs_bytes = 256 * 128 * 4

    def step() -> Tensor:
        h: Tensor = x * model[-1].weight.mean()
        for block in model[:-2]:
            h = checkpoint(block, h, use_reentrant=use_reentrant)  # type: ignore[assignment]
        return F.cross_entropy(model[-1](model[-2](h)), torch.arange(256) % 10)

    engine = run(model, step, x, bits=4)
    packed_inputs = [row for site, row in engine.ledger.sites.items() if site.operation == "checkpoint"]
    assert sum(row.raw_bytes for row in packed_inputs) == 3 * inputs_bytes
    assert sum(row.saved_bytes for row in packed_inputs) < 3 * inputs_bytes / 7
    assert not any(site.operation == "gelu" for site in engine.ledger.sites)


def test_inside_a_checkpoint_the_engine_steps_aside() -> None:
    """Hooks inside a non-reentrant checkpoint would store what the checkpoint exists to throw away."""
    engine = ActMemEngine(min_elements=0)
    x = torch.randn(64, 64, requires_grad=True)

    def segment(h: Tensor) -> Tensor:
        with engine.compress():
            return F.gelu(h).exp()

    checkpoint(segment, x * 1, use_reentrant=False).sum().backward()
    assert engine.step == 0
    assert x.grad is not None


def test_compiled_parts_are_left_alone_with_one_warning() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model[0]._compiled_call_impl = model[0]._call_impl  # marked as compiled; the compiler itself is not needed here
    x = torch.randn(64, 64)
    engine = ActMemEngine(min_elements=0)
    with (
        pytest.warns(ActMemWarning, match=r"compiled modules are not packed, the rest is: 0\."),
        engine.compress(model, inputs=x),
    ):
        model(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with engine.compress(model, inputs=x):
            model(x).sum().backward()
    assert {site.layer for site in engine.ledger.sites} == {"1", "2"}


def test_a_wholly_compiled_model_is_left_alone_with_a_warning() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(64, 64)), backend="eager")
    engine = ActMemEngine()
    with pytest.warns(ActMemWarning, match="compiled as a whole"), engine.compress(model):
        assert top_hooks() is None


def test_triton_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="backend='torch'"):
        ActMemEngine(backend="triton")


def test_cuda_without_triton_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("lightning_actmem.engine.find_spec", lambda name: None)
    with pytest.warns(ActMemWarning, match="pip install"):
        ActMemEngine()


@pytest.mark.parametrize("state", [{}, {"version": 2, "step": 1}])
def test_a_state_of_another_version_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be of version 1"):
        ActMemEngine().load_state_dict(state)


def test_engine_takes_a_config_and_overrides() -> None:
    assert ActMemEngine(ActMemConfig(bits=8), seed=3).config == ActMemConfig(bits=8, seed=3)


def test_report_of_a_step_that_saves_nothing() -> None:
    engine = ActMemEngine()
    with engine.compress(nn.Linear(2, 2)):
        pass
    report = engine.report()
    assert (report.ratio, report.bits_per_element, report.saved_bytes, report.rows) == (1.0, 0.0, 0, ())
