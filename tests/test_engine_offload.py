"""Offload in the engine: the gradients of the same run without it, to the bit, whatever backward does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_actmem import ActMemEngine, ActMemError
from lightning_actmem.saved.offload import Offload
from tests import models
from tests.saved.slow_transport import SlowTransport

Grads = list[Tensor]
PACK_ALL: dict[str, Any] = {"min_elements": 0, "group_size": 32}


def offloading(limit_bytes: int = 0, **config: Any) -> tuple[ActMemEngine, SlowTransport]:
    """An engine that moves tensors of any size, in small parcels, on the CPU."""
    engine, transport = ActMemEngine(**{**PACK_ALL, **config}), SlowTransport()
    offload = Offload(engine.ledger, limit_bytes, transport, parcel_bytes=4096, under_way=2, least_bytes=64)
    engine._store.offload = offload
    return engine, transport


def stack(depth: int = 6) -> nn.Sequential:
    layers = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(0.1)) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def gradients(engine: ActMemEngine, model: nn.Module, x: Tensor, backward: Callable[..., Any], steps: int = 2) -> Grads:
    """Return what is left in ``.grad`` after some steps on copies of a model."""
    model = copy.deepcopy(model)
    for step in range(steps):
        torch.manual_seed(step)
        backward(engine, model, x)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same(
    model: nn.Module, x: Tensor, backward: Callable[..., Any], limit_bytes: int = 0, least_moves: int = 2, **config: Any
) -> ActMemEngine:
    """Assert that the gradients are those without offload, and that tensors have moved and nothing is left of them."""
    engine, transport = offloading(limit_bytes, **config)
    found = gradients(engine, model, x, backward)
    wanted = gradients(ActMemEngine(**{**PACK_ALL, **config}), model, x, backward)
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert transport.calls["send"] >= least_moves
    assert transport.calls["bring"] >= 1
    assert transport.freed_early == 0
    engine.release()
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == 0
    places = engine.ledger.whereabouts
    assert places is not None
    assert (places.live_moved_bytes, places.live_buffer_bytes, places.live_host_bytes) == (0, 0, 0)
    return engine


def once(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    with engine.compress(model, inputs=x):
        loss = model(x).square().mean()
    loss.backward()


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 1},
        {"bits": 2},
        {"bits": 4},
        {"bits": 8, "derive": False},
        {"codec": "identity"},
        {"bits": 2, "activations": "derivative"},
        {"bits": 4, "activations": "inverted"},
        {"bits": 4, "codec": "bfp"},
        {"bits": 8, "codec": "fp8_e4m3"},
        {"bits": 4, "codec": "measured"},
    ],
    ids=str,
)
def test_every_codec(config: dict[str, Any]) -> None:
    assert_same(stack(), torch.randn(256, 32), once, **config)


def test_a_convolutional_network() -> None:
    """Masks are read in the forward pass, and batch norms wait for them."""
    assert_same(models.ResNet((1, 1), width=16, classes=4), torch.randn(2, 3, 32, 32), once, bits=2)


def test_a_transformer() -> None:
    model, tokens = models.gpt2(), torch.randint(0, 64, (2, 32))

    def backward(engine: ActMemEngine, model: nn.Module, tokens: Tensor) -> None:
        with engine.compress(model, inputs=tokens):
            loss = model(tokens, labels=tokens).loss
        loss.backward()

    assert_same(model, tokens, backward, bits=2)


@pytest.mark.parametrize("limit_bytes", [0, 15_000, 20_000, 30_000])
def test_any_limit(limit_bytes: int) -> None:
    engine = assert_same(stack(), torch.randn(256, 32), once, limit_bytes, bits=4)
    report = engine.report()
    assert report.offloaded_bytes
    assert report.device_bytes is not None
    assert report.device_bytes < report.saved_bytes
    if limit_bytes > 20_000:
        assert report.device_bytes <= limit_bytes


def test_nothing_moves_within_the_limit() -> None:
    engine, transport = offloading(10**9)
    gradients(engine, stack(), torch.randn(256, 32), once)
    assert not transport.calls["send"]
    report = engine.report()
    assert (report.device_bytes, report.offloaded_bytes) == (report.saved_bytes, 0)


# ---------------------------------------------------------------- backward in every way


def retained(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    with engine.compress(model, inputs=x):
        loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()


def second_order(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    x = x.requires_grad_()
    with engine.compress(model, inputs=x):
        loss = model(x).square().mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()


def two_losses(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    with engine.compress(model, inputs=x):
        first, second = model(x).square().mean(), model(x * 2).square().mean()
    first.backward()
    second.backward()


def part_of_it(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    assert isinstance(model, nn.Sequential)
    with engine.compress(model, inputs=x):
        hidden = model[:3](x)
        model[3:](hidden).sum()  # no backward: it dies unread
        loss = hidden.square().mean() + model[5:](model[4](model[3](hidden.detach()))).square().mean()
    inputs = list(model[:2].parameters())
    loss.backward(inputs=inputs)


def segments(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    assert isinstance(model, nn.Sequential)
    with engine.compress(model, inputs=x):
        hidden = model[0](x)
        for layer in model[1:]:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        loss = hidden.square().mean()
    loss.backward()


def after_the_next_forward(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    losses = []
    for scale in (1, 2, 3):
        with engine.compress(model, inputs=x):
            losses.append(model(x * scale).square().mean())
    for loss in losses:
        loss.backward()


def inside(engine: ActMemEngine, model: nn.Module, x: Tensor) -> None:
    with engine.compress(model, inputs=x):
        for scale in (1, 2):
            model(x * scale).square().mean().backward()


@pytest.mark.parametrize(
    "backward", [retained, second_order, two_losses, part_of_it, segments, after_the_next_forward, inside]
)
@pytest.mark.parametrize("limit_bytes", [0, 20_000])
def test_backward(backward: Callable[..., Any], limit_bytes: int) -> None:
    assert_same(stack(), torch.randn(512, 32), backward, limit_bytes, bits=4)


def test_an_exception_leaves_nothing() -> None:
    engine, transport = offloading()
    model, x = stack(), torch.randn(256, 32)

    def fail() -> None:
        with engine.compress(model, inputs=x):
            model(x)
            raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert gradients(engine, model, x, once, steps=1)
    assert transport.freed_early == 0
    engine.release()
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == 0
    assert not transport.idle


def test_an_error_in_backward_leaves_nothing() -> None:
    engine, transport = offloading()
    model, x = stack(), torch.randn(256, 32)

    def fail(_: Tensor) -> None:
        raise ZeroDivisionError

    with engine.compress(model, inputs=x):
        hidden = model[:3](x)
        hidden.register_hook(fail)
        loss = model[3:](hidden).square().mean()
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    del loss, hidden
    engine.release()
    engine.ledger.settle()
    assert engine.ledger.live_saved_bytes == 0
    assert transport.freed_early == 0


# ---------------------------------------------------------------- off, and refused


def test_probes_stay_on_the_device() -> None:
    engine = ActMemEngine(offload=True, adapt=True, **PACK_ALL)
    model, x = stack(2), torch.randn(64, 32)
    replay = engine.probe(lambda: model(x).square().mean(), model, inputs=x)
    assert replay.uses


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_an_error() -> None:
    engine = ActMemEngine(offload="2GiB")  # settings alone are no error: they may be meant for another machine
    with (
        pytest.raises(
            ActMemError, match=r"offload moves packed tensors .* torch sees no CUDA device\. Set offload=False"
        ),
        engine.compress(),
    ):
        pass
    with pytest.raises(ActMemError, match=r"torch sees no CUDA device"):
        engine.check_device(torch.device("cpu"))
    ActMemEngine().check_device(torch.device("cpu"))


def test_it_travels_to_another_process() -> None:
    engine = copy.deepcopy(ActMemEngine(offload="2GiB"))
    assert engine.config.offload == "2GiB"
    assert engine._store.offload is not None
    assert engine.ledger.whereabouts is not None
