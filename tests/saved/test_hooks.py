"""The contract of pack and unpack: autograd's semantics are untouched, and memory is what the ledger says."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_actmem import ActMemEngine

LOSSLESS = [{"bits": 32}, {"codec": "identity"}]


def engine(**config: Any) -> ActMemEngine:
    return ActMemEngine(**{"min_elements": 0, **config})


def gradients(step: Callable[[Tensor], Tensor], x: Tensor, config: dict[str, Any] | None) -> Tensor:
    """Return d step(x).sum() / dx, plain when there is no configuration."""
    x = x.detach().clone().requires_grad_()
    if config is None:
        loss = step(x * 1).sum()
    else:
        with engine(**config).compress():
            loss = step(x * 1).sum()
    loss.backward()  # a reentrant checkpoint refuses torch.autograd.grad
    assert x.grad is not None
    return x.grad


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunks": lambda x: sum(part.tanh() * part for part in x.chunk(3, dim=1)),  # type: ignore[misc]
    "transposed": lambda x: (x.t() * x.t()).exp(),
    "expanded": lambda x: x[:1].expand(8, -1).sigmoid() * x[:1].expand(8, -1),
    "strided": lambda x: (x[:, ::2] * x[:, 1::2]).tanh(),
    "overlapping": lambda x: x.unfold(1, 4, 1).square(),
    "channels last": lambda x: F.gelu(x.view(2, 4, 3, -1).to(memory_format=torch.channels_last)),
    "view of a view": lambda x: x.view(-1)[6:].view(6, -1).exp().t().square(),
    "in place": lambda x: F.relu(x * 2, inplace=True) * 3,
    "several versions": lambda x: (x * 2).tanh_().mul(x).add_(1).sigmoid_(),
    "empty": lambda x: x[:0].exp(),
    "scalar": lambda x: x.sum().exp(),
    "complex": lambda x: (torch.complex(x, x) * torch.complex(x, x * 2)).abs(),
    "conjugate": lambda x: (torch.complex(x, x).conj() * torch.complex(x, x)).real,
    "negative bit": lambda x: torch.complex(x, x).conj().imag * x,
    "double": lambda x: x.double().exp(),
    "sparse": lambda x: torch.sparse.mm(torch.eye(8).to_sparse(), x) * x,
    "nested": lambda x: torch.nested.to_padded_tensor(
        torch.nested.as_nested_tensor([x[:3], x[3:]], layout=torch.jagged).sin(), 0.0
    ),
    "custom function": lambda x: TwiceUnpacked.apply(x),  # type: ignore[no-any-return,no-untyped-call]
    "checkpoint": lambda x: checkpoint(torch.exp, x, use_reentrant=False),
    "reentrant checkpoint": lambda x: checkpoint(torch.exp, x, use_reentrant=True),
    "dropout": lambda x: F.dropout(x, 0.5) * torch.rand_like(x),
    "rrelu": lambda x: F.rrelu(x, training=True),  # saves its noise before filling it
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(48), torch.ones(48), training=True),
    "lstm": lambda x: nn.LSTM(48, 8)(x)[0],
    "sdpa": lambda x: F.scaled_dot_product_attention(*x.view(1, 8, 3, 16).unbind(2)),
}


class TwiceUnpacked(torch.autograd.Function):
    """Unpacks its tensor twice in one backward, and keeps another on ctx, where hooks do not reach."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.unseen = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (first,), (second,) = ctx.saved_tensors, ctx.saved_tensors
        assert torch.equal(first, second)
        return 3 * first * ctx.unseen * grad


@pytest.mark.parametrize("config", LOSSLESS, ids=str)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_lossless_gradients_are_bit_equal(step: Callable[[Tensor], Tensor], config: dict[str, Any]) -> None:
    x = torch.randn(8, 48)
    torch.manual_seed(1)
    expected = gradients(step, x, None)
    torch.manual_seed(1)
    assert torch.equal(gradients(step, x, config), expected)


def test_memory_that_is_used_again_is_another_tensor() -> None:
    """Keyed on the address alone, the second of two tensors at one address once got the first one's values."""
    x = torch.randn(64, 64, requires_grad=True)

    def step() -> Tensor:
        total = torch.zeros(())
        for scale in range(1, 9):
            total = total + (x * scale).exp().mean()  # each product dies before the next is made
        return total

    (expected,) = torch.autograd.grad(step(), x)
    with engine(codec="identity").compress():
        loss = step()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_one_storage_is_packed_once() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    compressor = engine(bits=4)
    with compressor.compress():
        h = x * 1
        h.tanh() + F.gelu(h) + F.silu(h).sum() + F.gelu(h.view(-1)).sum() + F.gelu(h[8:16]).sum() + F.gelu(h.t())
    rows = {str(site): row for site, row in compressor.ledger.sites.items() if site.operation != "tanh"}
    assert [row.codec for row in rows.values()] == ["uniform-4"] + ["shared"] * 4
    assert sum(row.raw_bytes for row in rows.values()) == 64 * 64 * 4


def test_a_changed_storage_is_packed_again() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    compressor = engine(codec="identity")
    with compressor.compress():
        h = x * 1
        first = F.gelu(h)
        h.add_(1)
        loss = (first + F.gelu(h)).sum()
    (grad,) = torch.autograd.grad(loss, x)
    expected = sum(
        torch.autograd.functional.vjp(lambda y, i=i: F.gelu(y + i), x, torch.ones(64, 64))[1] for i in (0, 1)
    )
    torch.testing.assert_close(grad, expected)


def test_an_exact_request_is_not_served_from_a_rounded_copy() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with engine(bits=2).compress():
        h = x * 1
        loss = F.gelu(h).sum() * 0 + h.softmax(1).detach().sum() + F.mse_loss(h, torch.zeros(64, 64))
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, 2 * x / x.numel(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 32])
def test_a_change_in_place_of_a_kept_tensor_is_the_error_of_autograd(bits: int) -> None:
    """Hooks switch autograd's version check off: what stays by reference must do it itself."""
    x = torch.randn(64, 64, requires_grad=True)
    with engine(bits=bits).compress():
        h = x * 1
        out = h.softmax(1)
        loss = out.sum()
        out.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1; expected version 0"):
        loss.backward()


def test_a_changed_weight_is_the_error_of_autograd() -> None:
    fc = nn.Linear(64, 64)
    with engine().compress(fc):
        loss = fc(torch.randn(64, 64, requires_grad=True) * 1).sum()
    with torch.no_grad():
        fc.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_packing_does_not_see_later_changes() -> None:
    """A packed copy gives the right gradient where plain autograd has to give up."""
    x = torch.randn(64, 64, requires_grad=True)
    with engine(codec="identity").compress():
        h = x * 1
        loss = F.gelu(h).sum()
        h.zero_()
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, torch.autograd.functional.vjp(F.gelu, x, torch.ones(64, 64))[1])


def test_a_graph_dropped_without_backward_frees_its_bytes_at_once() -> None:
    """Returning the live tensor from pack makes a cycle of result, node and hook: only the collector would free it."""
    compressor = engine()
    x = torch.randn(64, 64, requires_grad=True)
    gc.disable()
    try:
        with compressor.compress():
            out = (x * 1).exp().softmax(1)
        assert compressor.ledger.live_saved_bytes > 0
        del out
        compressor.ledger.settle()
        assert (compressor.ledger.live_saved_bytes, compressor.ledger.live_raw_bytes) == (0, 0)
    finally:
        gc.enable()


@pytest.mark.parametrize("config", [{"bits": 4}, {"bits": 2, "rounding": "stochastic"}, {"bits": 32}], ids=str)
def test_a_retained_graph_gives_the_same_gradient_twice(config: dict[str, Any]) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with engine(**config).compress():
        loss = F.gelu(F.relu(x * 1)).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("config", LOSSLESS, ids=str)
def test_double_backward(config: dict[str, Any]) -> None:
    def second_derivative(use: bool) -> Tensor:
        x = torch.linspace(-2, 2, 64, requires_grad=True)
        if use:
            with engine(**config).compress():
                (grad,) = torch.autograd.grad((x * x.sin()).sum(), x, create_graph=True)
                loss = (grad * x).sum()
        else:
            (grad,) = torch.autograd.grad((x * x.sin()).sum(), x, create_graph=True)
            loss = (grad * x).sum()
        return torch.autograd.grad(loss, x)[0]

    assert torch.equal(second_derivative(True), second_derivative(False))


def test_unpack_in_another_thread() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with engine(bits=4).compress():
        loss = F.gelu(x * 1).sum()
    here = torch.autograd.grad(loss, x, retain_graph=True)[0]
    there: list[Tensor] = []
    thread = threading.Thread(target=lambda: there.append(torch.autograd.grad(loss, x)[0]))
    thread.start()
    thread.join()
    assert torch.equal(here, there[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", [F.gelu, F.relu, F.silu])
def test_a_non_finite_activation_gives_a_non_finite_gradient(
    activation: Callable[[Tensor], Tensor], bad: float
) -> None:
    """A GradScaler has to see an overflow."""
    x = torch.randn(64, 64)
    x[3, 5] = bad
    fc = nn.Linear(64, 64)
    with engine(bits=4).compress(fc):
        loss = fc(activation(x.requires_grad_() * 1)).sum()
    loss.backward()
    assert fc.weight.grad is not None
    assert not fc.weight.grad.isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_relu_passes_gradient_where_its_output_is_positive_and_only_there(bits: int) -> None:
    """Packed without an exact sign, a ReLU's gradient is off by half its size at 2 bits, nearly all of it bias."""
    x = torch.randn(64, 64, requires_grad=True)
    with engine(bits=bits).compress():
        loss = F.relu(x * 1).sum()
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(grad, (x > 0).float())


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout])
def test_max_pool_and_dropout_gradients_are_exact(dropout: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 4, 32, 32, requires_grad=True)

    def step() -> Tensor:
        torch.manual_seed(3)
        return dropout(F.max_pool2d(x * 1, 2), 0.3, True).sum()

    with engine(bits=2).compress():
        loss = step()
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.autograd.grad(step(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [(64, 1), (1, 64)])
def test_unpacked_tensors_look_like_the_saved_ones(dtype: torch.dtype, stride: tuple[int, int]) -> None:
    seen: list[Tensor] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.extend(ctx.saved_tensors)
            return grad * 2

    x = torch.randn(64, 64, dtype=dtype).as_strided((64, 64), stride).requires_grad_()
    with engine(codec="identity").compress():
        saved = x.clone(memory_format=torch.preserve_format)
        loss = Look.apply(saved).sum()  # type: ignore[no-untyped-call]
    loss.backward()
    assert torch.equal(seen[0], saved)
    assert (seen[0].dtype, seen[0].stride(), seen[0].device) == (dtype, saved.stride(), saved.device)
    assert seen[0].data_ptr() != saved.data_ptr()


def test_a_small_view_does_not_keep_a_large_storage_alive() -> None:
    """The class token of a transformer is a view of every token's features."""
    x = torch.randn(4, 256, 64, requires_grad=True)
    compressor = ActMemEngine(min_elements=1024)
    with compressor.compress():
        (x * 1)[:, 0].exp().sum()  # exp saves its own result: small; the product saves nothing
        F.gelu((x * 1)[:, 0]).sum()
    report = compressor.report()
    assert report.stored_bytes <= 2 * 4 * 64 * 4


def test_packing_leaves_autocast_and_grad_mode_alone() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), engine(bits=4).compress():
        loss = (F.gelu(x * 1) @ nn.Parameter(torch.randn(64, 64))).float().sum()
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    loss.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def stored_tensors(held: Any) -> Iterator[Tensor]:
    """Yield what a handle holds, its own and what it is derived from; weights aside."""
    if isinstance(held, nn.Parameter) or held is None:
        return
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (tuple, list)):
        for item in held:
            yield from stored_tensors(item)
    else:
        for name in ("payload", "tensors", "mask", "_tensor", "_handle", "_handles", "_inner"):
            yield from stored_tensors(getattr(held, name, None))


@pytest.mark.parametrize("derive", [False, True])
def test_every_byte_in_the_ledger_is_a_real_storage(derive: bool) -> None:
    """Sum the storages that the handles of the graph really hold, and compare with the ledger."""
    x = torch.randn(64, 64, requires_grad=True)
    handles: list[Any] = []
    compressor = engine(bits=3, group_size=64, derive=derive)
    fc = nn.Parameter(torch.randn(64, 64))
    pack = compressor._hooks.pack
    compressor._stack._pair = (lambda t: handles.append(pack(t)) or handles[-1]), compressor._hooks.unpack
    with compressor.compress():
        h = F.dropout(F.relu(x * 1), 0.5)
        q, k, v = (h * i for i in (1, 2, 3))
        out = F.scaled_dot_product_attention(q[None], k[None], v[None])
        F.cross_entropy(F.max_pool1d(F.gelu(out), 2)[0], torch.arange(64) % 32)
        F.leaky_relu(F.softmax(F.layer_norm(F.relu(h), (64,)).tanh() @ fc, 1))
    storages: dict[int, int] = {}
    for handle in handles:
        for tensor in stored_tensors(handle):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    borrowed = sum(saved for kind, (_, saved) in compressor.report().bytes_by_kind.items() if kind == "input")
    assert compressor.ledger.live_saved_bytes == sum(storages.values()) - borrowed
    assert compressor.ledger.live_saved_bytes == compressor.report().stored_bytes
