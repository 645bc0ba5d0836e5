"""Replay: exact gradients, rounded ones, and what a probe must not touch."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.adapt.replay import ExactGradient, Replay
from lightning_actmem_kernels import CodecSpec
from tests import models

Task = tuple[nn.Module, Callable[[], Tensor], Any]


def mlp() -> Task:
    model, x = models.mlp(), torch.randn(128, 128)
    return model, lambda: F.cross_entropy(model(x), torch.arange(128) % 10), x


def resnet() -> Task:
    model, x = models.ResNet((1, 1), width=16, classes=10), torch.randn(8, 3, 64, 64)
    return model, lambda: F.cross_entropy(model(x), torch.arange(8) % 10), x


def transformer(build: Callable[[], nn.Module]) -> Task:
    count = 4 if build is models.gpt2 else 16  # a classifier has one loss for each sequence
    model, ids = build(), torch.randint(0, 256, (count, 64))
    labels = ids if build is models.gpt2 else torch.arange(count) % 2
    return model, lambda: model(input_ids=ids, labels=labels).loss, (ids, labels)


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": mlp,
    "resnet": resnet,
    "gpt2": lambda: transformer(models.gpt2),
    "bert with dropout": lambda: transformer(models.bert),
}


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def begin(task: Task, **config: Any) -> tuple[ActMemEngine, Replay, ExactGradient]:
    model, loss, inputs = task
    engine = ActMemEngine(**config)
    replay = engine.probe(loss, model, inputs=inputs)
    exact = ExactGradient(parameters_of(model))
    exact.take(replay)
    return engine, replay, exact


@pytest.mark.parametrize("name", TASKS)
def test_the_exact_pass_is_plain_autograd(name: str) -> None:
    task = model, loss, _ = TASKS[name]()
    torch.manual_seed(3)
    plain = torch.autograd.grad(loss(), parameters_of(model), allow_unused=True)
    torch.manual_seed(3)
    _, _, exact = begin(task, bits=2)
    size = sum(gradient.square().sum() for gradient in plain if gradient is not None)
    for index, gradient in enumerate(plain):
        if gradient is None:
            assert index not in exact._gradient
        else:  # what is derived differs by the order of additions
            assert (exact._gradient[index] - gradient).square().sum() <= 1e-9 * size


@pytest.mark.parametrize("name", TASKS)
def test_a_rounded_pass_leaves_no_trace(name: str) -> None:
    """Decoded segments are remembered between operations: not from one pass to the next."""
    _, replay, exact = begin(TASKS[name](), bits=2)
    everything = {site: use.default for site, use in replay.uses.items()}
    before = [gradient.clone() for gradient in exact._gradient.values()]
    errors = [exact.error(replay, everything).item() for _ in range(2)]
    assert errors[0] != errors[1] > 0
    _, distance = exact.take(replay)
    assert distance == 0
    assert all(map(torch.equal, before, exact._gradient.values()))


def test_a_site_by_itself_has_the_error_that_training_has() -> None:
    task = model, loss, inputs = mlp()
    engine, replay, exact = begin(task, bits=2)
    plain = torch.autograd.grad(loss(), parameters_of(model))
    for site, use in list(replay.uses.items())[:3]:
        probed = [exact.error(replay, {site: use.default}).item() for _ in range(20)]
        engine.plan = {other: None for other in replay.uses if other != site}
        trained = []
        for _ in range(20):
            with engine.compress(model, inputs=inputs):
                value = loss()
            packed = torch.autograd.grad(value, parameters_of(model))
            trained.append(sum((a - b).square().sum().item() for a, b in zip(plain, packed, strict=True)))
        assert sum(probed) == pytest.approx(sum(trained), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["resnet", "gpt2", "bert with dropout"])
def test_sites_add_up_to_the_whole(name: str, bits: int) -> None:
    _, replay, exact = begin(TASKS[name](), bits=bits)
    everything = {site: use.default for site, use in replay.uses.items()}
    parts = sum(exact.error(replay, {site: spec}).item() for site, spec in everything.items() for _ in range(8)) / 8
    whole = sum(exact.error(replay, everything).item() for _ in range(24)) / 24
    assert parts == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_probe_rounds_behind_the_sign_of_a_relu_as_training_does(bits: int) -> None:
    """The input of a batch norm is stored as its magnitude where a ReLU's sign is stored too."""
    task = model, loss, inputs = resnet()
    engine, replay, exact = begin(task, bits=2, adapt=True)
    specs = {site: use.default for site, use in replay.uses.items()}
    specs |= {site: CodecSpec("rotated", bits, centre=True) for site in specs if site.operation == "batch_norm"}
    assert any(payload() is not None and payload().sign is not None for payload in replay._rounding.payloads)
    probed = sum(exact.error(replay, specs).item() for _ in range(10))
    engine.plan = specs
    plain = torch.autograd.grad(loss(), parameters_of(model))
    trained = 0.0
    for _ in range(10):
        with engine.compress(model, inputs=inputs):
            value = loss()
        packed = torch.autograd.grad(value, parameters_of(model))
        trained += sum((a - b).square().sum().item() for a, b in zip(plain, packed, strict=True))
    assert probed == pytest.approx(trained, rel=0.1)


def test_bias_shows_where_rounding_is_biased() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Flatten(), nn.Linear(64, 4))
    x = torch.randn(512, 64)
    shares = []
    for rounding in ("dither", "nearest"):
        engine = ActMemEngine(bits=2, codec="uniform", rounding=rounding, derive=False)
        replay = engine.probe(lambda: (model(x) ** 2).mean(), model, inputs=x)
        exact = ExactGradient(list(model.parameters()))
        exact.take(replay)
        specs = {site: use.default for site, use in replay.uses.items()}
        shares.append((exact.bias(replay, specs, 8) / exact.error(replay, specs)).item())
    assert abs(shares[0]) < 0.1
    assert shares[1] == pytest.approx(1.0)  # no noise: every draw is the same
    with pytest.raises(ValueError, match="at least 2, got 1"):
        exact.bias(replay, specs, 1)


def test_what_a_probe_does_not_touch() -> None:
    model, loss, inputs = mlp()
    engine = ActMemEngine(bits=2)
    with engine.compress(model, inputs=inputs):
        loss().backward()
    report, step = engine.report(), engine.step
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    state, python = torch.get_rng_state(), random.getstate()
    calls: list[int] = []
    accumulators = [parameter.expand_as(parameter).grad_fn.next_functions[0][0] for parameter in model.parameters()]
    hooks = [accumulator.register_hook(lambda *_: calls.append(1)) for accumulator in accumulators]
    replay = engine.probe(loss, model, inputs=inputs)
    exact = ExactGradient(parameters_of(model))
    exact.take(replay)
    exact.error(replay, {site: use.default for site, use in replay.uses.items()})
    assert calls == []
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
    assert (engine.report(), engine.step) == (report, step)
    assert all(
        torch.equal(parameter.grad, grad)
        for parameter, grad in zip(model.parameters(), grads, strict=True)
        if parameter.grad is not None
    )
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    for hook in hooks:
        hook.remove()


def test_a_probe_is_freed() -> None:
    _, replay, exact = begin(mlp(), bits=2)
    ledger = replay._rounding.ledger
    assert replay.stored_bytes == ledger.peak_saved_bytes > 0
    del replay, exact
    gc.collect()
    ledger.settle()
    assert ledger.live_saved_bytes == 0


def test_gradients_are_not_held_together() -> None:
    """What autograd gathers is a number for every parameter: the gradients themselves are freed one by one."""
    model, _, _ = task = mlp()
    _, replay, _ = begin(task, bits=2)
    alive: list[Any] = []

    def visit(index: int, gradient: Tensor) -> None:
        alive.append(gradient.untyped_storage()._weak_ref())
        dead = sum(torch.UntypedStorage._expired(reference) for reference in alive)
        most.append(len(alive) - dead)

    most: list[int] = []
    replay.backward(parameters_of(model), {}, visit)
    assert len(most) == len(parameters_of(model))
    assert max(most) <= 4
    for reference in alive:
        torch.UntypedStorage._free_weak_ref(reference)
