"""Chains of element-wise operations that keep their derivative: what is stored, and how exact gradients are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.methods import DerivativeChains
from lightning_actmem.saved.identify import Verdict
from lightning_actmem.saved.site import Site
from lightning_actmem_kernels import CodecSpec, Layout, decode, encode
from tests.methods.support import (
    BYTES,
    CHAINS,
    SHAPE,
    engine_of,
    gelu_new,
    gradients,
    inputs,
    named_steps,
    raw_bytes,
    saved_bytes,
)


@pytest.mark.parametrize("name", CHAINS)
def test_gradients_of_chains(name: str) -> None:
    roots = inputs(torch.float64)
    compute = CHAINS[name][0]
    plain, packed = gradients(compute, roots, None), gradients(compute, roots, engine_of())
    for expected, found in zip(plain, packed, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", CHAINS)
def test_one_derivative_for_each_root(name: str, bits: int) -> None:
    compute, tensors = CHAINS[name]
    engine = engine_of(bits)
    a, b = (root * 1 for root in inputs())
    with engine.compress():
        out = compute(a, b)
    each = {BYTES if bits == 32 else spec.stored_bytes(64 * 256, torch.float32) for spec in _specs(engine)}
    assert tensors * min(each) <= saved_bytes(engine) <= tensors * max(each)
    del out
    assert saved_bytes(engine) == 0
    assert raw_bytes(engine) == 0


def _specs(engine: ActMemEngine) -> list[CodecSpec]:
    codecs = {row.codec for row in engine.ledger.sites.values()} - {"derived", "shared", "exact"}
    return [CodecSpec(name.split("-")[0], int(name.split("-")[1])) for name in codecs] or [CodecSpec("identity")]


def test_gelu_new_keeps_one_derivative_instead_of_four_tensors() -> None:
    """Plain autograd keeps x, half of it, tanh and one more than tanh."""
    plain = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal plain
        plain += tensor.nbytes if tensor.numel() > 1 else 0
        return tensor

    x = inputs()[0] * 1
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        gelu_new(x)
    assert plain == 4 * BYTES
    exact, packed = engine_of(), engine_of(4)
    with exact.compress():
        out = gelu_new(x)
    assert (saved_bytes(exact), raw_bytes(exact)) == (BYTES, 4 * BYTES)
    with packed.compress():
        also = gelu_new(x)
    assert saved_bytes(packed) == 64 * (128 + 4)  # 64 groups of 256 elements: codes, and minimum and step
    assert raw_bytes(packed) == 4 * BYTES
    assert torch.equal(out, also)


def test_the_report_names_the_operation_and_bounded_derivatives_take_no_metadata() -> None:
    engine = engine_of(2)
    x = inputs()[0] * 1
    with engine.compress():
        out = nn.GELU()(x)
    assert out.requires_grad
    ((site, row),) = engine.ledger.sites.items()
    assert (site.operation, site.role, row.kind, row.codec) == ("gelu", "derivative", "packed", "fixed-2")
    assert row.saved_bytes == saved_bytes(engine) == 64 * 256 * 2 // 8
    assert row.raw_bytes == BYTES
    assert engine.report().ratio == 16


def test_scaling_scales_the_bounds() -> None:
    engine = engine_of(8)
    x = inputs()[0]
    with engine.compress():
        out = torch.tanh((x * 1) * -3.0) / 4
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert [row.codec for row in engine.ledger.sites.values()] == ["fixed-8", "fixed-8"]
    exact = -0.75 * (1 - torch.tanh(-3 * x).square())
    assert float((grad - exact).detach().abs().max()) <= 0.75 / 255 / 2 * 1.02


def test_intermediate_derivatives_are_never_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_actmem.saved import store

    encoded = []
    monkeypatch.setattr(store, "encode", lambda flat, *a, **k: encoded.append(flat.numel()) or encode(flat, *a, **k))
    x = inputs()[0] * 1
    with engine_of(4).compress():
        held = gelu_new(x), named_steps(x, x.clone())
    assert len(encoded) == 3  # one for gelu_new, and one for each of two roots
    assert all(out.requires_grad for out in held)


def test_codecs_are_measured_on_what_is_encoded() -> None:
    """A chooser of codecs hears of the derivatives that are encoded, not of those that die within their chain."""
    engine = engine_of(4)
    seen = []

    class Listener:
        def put(self, tensor: Tensor, layout: Layout, site: Site, verdict: Verdict, spec: CodecSpec | None) -> None:
            seen.append((str(site), spec and spec.codec))

    engine._store.watch = Listener()
    x = inputs()[0] * 1
    with engine.compress():
        held = gelu_new(x), F.gelu(x)
    assert seen == [("/mul.derivative#2", "uniform"), ("/gelu.derivative", "fixed")]
    assert all(out.requires_grad for out in held)


def test_few_results_are_held_in_full() -> None:
    """However many results the user holds, derivatives that wait in full are few."""
    engine = engine_of(4)
    chains = cast("DerivativeChains", engine._methods._methods["derivative"])
    x = inputs()[0] * 1
    with engine.compress():
        held = [torch.sin(x * scale) for scale in range(1, 12)]
        assert len(engine._store.deferred.waiting) <= 5
        assert len(chains._open) <= 4
    assert len(engine._store.deferred.waiting) == len(chains._open) == 0
    assert saved_bytes(engine) == len(held) * CodecSpec("fixed", 4).stored_bytes(64 * 256, torch.float32)


@pytest.mark.parametrize("function", [F.gelu, F.silu, gelu_new])
def test_the_gradient_is_unbiased(function: Callable[[Tensor], Tensor]) -> None:
    """Rounding the input instead has a bias of a fifth of its error at 2 bits."""
    x, draws = torch.randn(SHAPE, requires_grad=True), 400
    (exact,) = torch.autograd.grad(function(x).sum(), x)
    engine = engine_of(2)
    errors = []
    for _ in range(draws):
        with engine.compress():
            out = function(x * 1)
        errors.append(torch.autograd.grad(out.sum(), x)[0] - exact)
    error = torch.stack(errors).double()
    # Means of `draws` errors: their squares have the expectation variance / draws, and add up over many elements.
    of_means = error.mean(0).square().mean() * draws / error.var(0).mean()
    assert 0.95 < float(of_means) < 1.05


@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
def test_a_fifth_of_the_error_of_rounding_the_input_with_min_max_groups(rounding: str) -> None:
    """GELU at 2 bits; the rotated codec on the input stands between the two."""
    x = torch.randn(1 << 18, requires_grad=True)
    (exact,) = torch.autograd.grad(F.gelu(x).sum(), x)

    def error(**settings: Any) -> float:
        with ActMemEngine(bits=2, rounding=rounding, **settings).compress():
            out = F.gelu(x * 1)
        return float((torch.autograd.grad(out.sum(), x)[0] - exact).double().square().mean())

    derivative, min_max, rotated = error(activations="derivative"), error(codec="uniform"), error(codec="rotated")
    assert derivative <= min_max / 5
    assert derivative < rotated < min_max
    if rounding == "dither":
        assert derivative == pytest.approx((1.25802 / 3) ** 2 / 12, rel=0.02)


def test_training_with_a_layer_between_derives_the_output_where_its_source_is_stored() -> None:
    """The norm's input is stored, the GELU's output follows from it: only the derivative is new."""
    model = nn.Sequential(nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 256))
    engine = engine_of(4)
    with engine.compress(model):
        out = model(torch.randn(SHAPE, requires_grad=True) * 1)
    rows = {f"{site.operation}.{site.role}": row.codec for site, row in engine.ledger.sites.items()}
    assert rows["gelu.derivative"] == "fixed-4"
    assert rows["linear.input"] == "derived"
    out.sum().backward()


def test_the_derivative_of_a_square_is_the_tensor_that_a_norm_keeps_anyway() -> None:
    def rms_norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    roots = inputs()[:1]
    plain, engine = ActMemEngine(bits=4), engine_of(4)
    held = []
    for either in (plain, engine):
        x = roots[0] * 1
        with either.compress():
            held.append(rms_norm(x))
    assert saved_bytes(engine) == saved_bytes(plain)
    assert raw_bytes(engine) == raw_bytes(plain)
    with engine_of().compress():
        out = rms_norm(roots[0] * 1)
    weight = torch.linspace(-1, 1, out.numel()).view(SHAPE)
    (expected,), (exact,), (rounded,) = (
        torch.autograd.grad((each * weight).sum(), roots) for each in (rms_norm(roots[0]), out, held[1])
    )
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-5)
    assert float((rounded - expected).norm() / expected.norm()) < 0.1


def test_decoded_derivatives_are_what_the_codec_makes_of_them() -> None:
    """No more than one rounding lies between the derivative and the gradient."""
    x = torch.randn(256, 16, requires_grad=True)
    with engine_of(1, min_elements=0, rounding="nearest").compress():
        out = torch.sigmoid(x * 1)
    (grad,) = torch.autograd.grad(out.sum(), x)
    y = torch.sigmoid(x.detach())
    spec = CodecSpec("fixed", 1, rounding="nearest", low=0.0, high=0.25)
    flat = (y * (1 - y)).flatten()
    expected = decode(encode(flat, spec, key=0), spec, numel=flat.numel(), dtype=flat.dtype, key=0).view(x.shape)
    assert torch.equal(grad, expected)
