"""Derivation: what follows from stored tensors is computed again, never stored, and never wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_actmem import ActMemEngine
from lightning_actmem.saved import derive
from lightning_actmem.saved.handle import Kept
from lightning_actmem.saved.operation import operation_of, plain_name
from lightning_actmem.saved.payload import DecodeCache
from lightning_actmem.saved.share import SharedStorages
from lightning_actmem.saved.tracker import Call
from tests import models
from tests.saved.chains import CASTS, CHAINS, IN_OTHER_TESTS, WITHOUT_INPUT, Layers, gelu_new, in_place_block, sequence

# Recomputing in another order of additions: a few units in the last place of float32, once per operation of a chain.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def consume(m: Layers, h: Tensor) -> Tensor:
    """Use a tensor in a way that saves it."""
    return (m.head(h) if h.dim() == 4 and h.shape[1] == 8 else m.last(h)).sum()


def gradients(
    m: Layers, x: Tensor, chain: Callable[[Layers, Tensor], Tensor], engine: ActMemEngine | None
) -> list[Tensor]:
    torch.manual_seed(5)
    m.train()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    if engine is None:
        loss = consume(m, chain(m, x * 1))
    else:
        with engine.compress(m):
            loss = consume(m, chain(m, x * 1))
    grads = torch.autograd.grad(loss, [x, *m.parameters()], allow_unused=True)
    return [grad for grad in grads if grad is not None]


def image(memory_format: torch.memory_format, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 8, 6, 6, dtype=dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_gradients_from_lossless_payloads(chain: Callable[..., Tensor], memory_format: torch.memory_format) -> None:
    m, x = Layers(), image(memory_format)
    engine = ActMemEngine(bits=32, derive=True, min_elements=0)
    for packed, plain in zip(gradients(m, x, chain, engine), gradients(m, x, chain, None), strict=True):
        torch.testing.assert_close(packed, plain, **ROUNDING)


class Names(TorchFunctionMode):
    """Collects the plain names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(plain_name(func))
        return func(*args, **kwargs or {})


def test_every_derived_operation_is_in_a_chain_or_in_a_test_of_attention() -> None:
    names = Names()
    with names:
        for chain in CHAINS.values():
            chain(Layers(), image(torch.contiguous_format))
    assert names.seen | IN_OTHER_TESTS >= derive.REPLAYED | derive.FROM_SAVED


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(CHAINS.keys() - CASTS)),
    size=st.tuples(st.integers(1, 4), st.just(8), st.integers(3, 9), st.integers(3, 9)),
    channels_last=st.booleans(),
)
def test_gradients_of_any_shape_follow_float64(name: str, size: tuple[int, ...], channels_last: bool) -> None:
    """Derived in float32 from lossless payloads, against autograd in float64."""
    torch.manual_seed(7)
    m = Layers()
    x = torch.randn(size).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    packed = gradients(m, x, CHAINS[name], ActMemEngine(bits=32, derive=True, min_elements=0))
    for ours, reference in zip(packed, gradients(m.double(), x.double(), CHAINS[name], None), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max() + 1))


@pytest.mark.parametrize("name", sorted(CHAINS.keys() - WITHOUT_INPUT))
def test_the_end_of_each_chain_is_derived(name: str) -> None:
    """What the consumer would save costs no bytes (a ReLU's sign costs one bit per element)."""
    engine = ActMemEngine(bits=4, min_elements=0, group_size=32)
    gradients(Layers(), image(torch.contiguous_format), CHAINS[name], engine)
    (consumed,) = [
        row for site, row in engine.ledger.sites.items() if site.layer in {"head", "last"} and row.kind == "packed"
    ]
    assert consumed.codec in {"derived", "shared"}
    assert consumed.saved_bytes == 0


def test_gelu_new_stores_one_tensor() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    engine = ActMemEngine(bits=4, min_elements=0)
    with engine.compress():
        loss = (gelu_new(x * 1) @ nn.Parameter(torch.randn(64, 64))).sum()
    stored = [row for row in engine.ledger.sites.values() if row.saved_bytes and row.kind == "packed"]
    assert len(stored) == 1
    assert engine.report().ratio > 38
    loss.backward()


def test_a_chain_keeps_no_raw_tensor_alive() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    engine = ActMemEngine(bits=4, min_elements=0)
    made: list[int] = []
    gc.collect()
    with engine.compress():
        h = x * 1
        out = F.silu(F.gelu(h))
        loss = (out @ nn.Parameter(torch.randn(64, 64))).sum()
        made = [h.untyped_storage()._weak_ref(), out.untyped_storage()._weak_ref()]  # type: ignore[attr-defined]
        del h, out
        alive = [torch.UntypedStorage._new_with_weak_ptr(weak) is not None for weak in made]
    assert alive == [False, False]
    for weak in made:
        torch.UntypedStorage._free_weak_ref(weak)
    loss.backward()


@pytest.mark.parametrize("bits", [2, 4])
def test_relu_gradients_pass_exactly_where_the_output_was_positive(bits: int) -> None:
    m, x = Layers(), image(torch.contiguous_format).requires_grad_()
    engine = ActMemEngine(bits=bits, min_elements=0)
    with engine.compress(m):
        normed = m.batch_norm(x * 1)
        normed.retain_grad()
        F.relu(normed).sum().backward()
    assert normed.grad is not None
    assert torch.equal(normed.grad, (normed > 0).float())


def test_batch_norm_is_derived_from_the_statistics_of_the_forward() -> None:
    """Running statistics are not touched again, and the stored (rounded) input's statistics are not used."""
    m, x = Layers(), image(torch.contiguous_format)
    twin = Layers()
    twin.load_state_dict(m.state_dict())
    gradients(m, x, CHAINS["relu"], ActMemEngine(bits=2, min_elements=0))
    gradients(twin, x, CHAINS["relu"], None)
    for name, buffer in m.named_buffers():
        assert torch.equal(buffer, dict(twin.named_buffers())[name])


def test_a_view_of_a_part_is_not_mistaken_for_the_whole() -> None:
    x = torch.randn(4, 8, 8, requires_grad=True)

    def step(h: Tensor) -> Tensor:
        out = F.gelu(h)
        out[1].mul_(3)  # changes part of the storage: the recipe for the whole is void
        return out[1:3].exp().sum() + out.select(0, 1).square().sum()

    with ActMemEngine(bits=32, derive=True, min_elements=0).compress():
        loss = step(x * 1)
    (packed,) = torch.autograd.grad(loss, x)
    (plain,) = torch.autograd.grad(step(x * 1), x)
    torch.testing.assert_close(packed, plain)


def test_a_change_without_gradient_voids_the_recipe() -> None:
    x = torch.randn(16, 16, requires_grad=True)
    w = nn.Parameter(torch.randn(16, 16))

    def step() -> Tensor:
        out = F.gelu(x * 1)
        with torch.no_grad():
            out.clamp_(max=0.5)
        return (out @ w).sum()

    with ActMemEngine(bits=32, derive=True, min_elements=0).compress():
        loss = step()
    (packed,) = torch.autograd.grad(loss, w)
    assert torch.equal(packed, torch.autograd.grad(step(), w)[0])


def test_a_buffer_changed_after_use_does_no_harm() -> None:
    """Autograd does not save what it adds; a recipe that held it by reference would see the change, or refuse it."""
    m = nn.BatchNorm1d(64)
    x = torch.randn(128, 64, requires_grad=True)
    w = nn.Parameter(torch.randn(64, 64))
    assert m.running_mean is not None
    engine = ActMemEngine(bits=32, derive=True, min_elements=0)
    with engine.compress(m):
        h = F.gelu(x * 1) + m.running_mean
        loss = (h @ w).sum()
        m.running_mean.add_(100)
    (packed,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(packed, F.gelu(x.detach()).sum(0)[:, None].expand(64, 64))
    assert any(row.codec == "derived" for row in engine.ledger.sites.values())


def test_a_changed_norm_weight_is_an_error_and_not_a_wrong_gradient() -> None:
    m, x = Layers(), image(torch.contiguous_format).requires_grad_()
    with ActMemEngine(bits=4, min_elements=0).compress(m):
        loss = m.fc(m.layer_norm(sequence(x * 1))).sum()
    with torch.no_grad():
        m.layer_norm.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_recipes_run_under_the_autocast_state_of_the_forward() -> None:
    m, x = Layers(), image(torch.contiguous_format)

    def weight_gradient(engine: ActMemEngine | None) -> Tensor:
        h = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if engine is None:
                loss = m.conv(F.relu(m.batch_norm(m.conv(h)))).float().sum()
            else:
                with engine.compress(m):
                    loss = m.conv(F.relu(m.batch_norm(m.conv(h)))).float().sum()
        return torch.autograd.grad(loss, m.conv.weight)[0]

    packed = weight_gradient(ActMemEngine(bits=32, derive=True, min_elements=0))
    torch.testing.assert_close(packed, weight_gradient(None), rtol=0.02, atol=0.05)


def test_running_again_twice_gives_the_same_gradient() -> None:
    m, x = Layers(), image(torch.contiguous_format).requires_grad_()
    with ActMemEngine(bits=2, min_elements=0).compress(m):
        loss = in_place_block(m, x * 1).sum()
    first, second = (torch.autograd.grad(loss, [x, m.conv.weight], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("build", [models.gpt2, models.bert, models.llama])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers_are_exact_under_lossless_packing(build: Callable[..., nn.Module], attention: str) -> None:
    """Dropout, padding mask, grouped queries and all: exact to rounding, from well under two thirds of the bytes."""
    model = build(attention)
    ids = torch.randint(0, 256, (4, 64))
    padding = torch.ones_like(ids)
    padding[:, 50:] = 0
    labels = torch.zeros(4, dtype=torch.long) if build is models.bert else ids
    batch = {"input_ids": ids, "attention_mask": padding, "labels": labels}

    def step(engine: ActMemEngine | None) -> list[Tensor]:
        torch.manual_seed(3)
        if engine is None:
            loss = model(**batch).loss
        else:
            with engine.compress(model, inputs=batch):
                loss = model(**batch).loss
        model.zero_grad()
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    engine = ActMemEngine(bits=32, derive=True, min_elements=0)
    packed = [grad.clone() for grad in step(engine)]
    for ours, theirs in zip(packed, step(None), strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)
    assert engine.report().ratio > 1.6


def test_the_reach_of_a_recipe_is_limited() -> None:
    """A chain of any length must not be computed again from its beginning for every link."""
    x = torch.randn(64, 64, requires_grad=True)
    engine = ActMemEngine(bits=4, min_elements=0)
    with engine.compress():
        h = x * 1
        for _ in range(40):
            h = F.gelu(h)
        loss = h.sum()
    stored = [row for row in engine.ledger.sites.values() if row.codec == "uniform-4"]
    assert len(stored) == 5  # the first, and one after every 8 operations
    loss.backward()


def test_derivation_can_be_switched_off() -> None:
    m, x = Layers(), image(torch.contiguous_format)
    engine = ActMemEngine(bits=4, min_elements=0, derive=False)
    gradients(m, x, CHAINS["gelu"], engine)
    assert not any(row.codec == "derived" for row in engine.ledger.sites.values())


@pytest.mark.parametrize("config", [{"bits": 4}, {"bits": 32, "derive": True}])
def test_sites_and_random_streams_are_as_without(config: dict[str, Any]) -> None:
    m, x = Layers(), image(torch.contiguous_format)
    state = torch.get_rng_state()
    with ActMemEngine(min_elements=0, **config).compress(m):
        F.dropout(F.gelu(m.fc(sequence(x.requires_grad_() * 1))), 0.5)
    packed = torch.get_rng_state()
    torch.set_rng_state(state)
    F.dropout(F.gelu(m.fc(sequence(x * 1))), 0.5)
    assert torch.equal(packed, torch.get_rng_state())


@pytest.mark.parametrize(("min_elements", "noted"), [(16, True), (17, False)])
def test_results_too_small_to_be_packed_are_not_noted(min_elements: int, noted: bool) -> None:
    shared = SharedStorages()
    deriver = derive.Deriver(shared, DecodeCache(), Kept, min_elements)
    x = torch.randn(16, requires_grad=True)
    call = Call(operation_of(torch.relu), torch.relu, (x,), {})
    result = torch.relu(x)
    deriver.after(call, result)
    assert shared.is_known(result.untyped_storage()._cdata) is noted
