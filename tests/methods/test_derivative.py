"""Chains of element-wise operations that keep their derivative: what is stored, and that gradients are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_actmem import ActMemEngine, ActMemError
from lightning_actmem.saved.identify import Verdict
from lightning_actmem.saved.site import Site
from lightning_actmem_kernels import CodecSpec, Layout, decode, encode

SHAPE = (64, 256)
BYTES = 64 * 256 * 4


def gelu_new(x: Tensor) -> Tensor:
    """GELU as Hugging Face writes it out for GPT-2."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def named_steps(a: Tensor, b: Tensor) -> Tensor:
    """Every intermediate result stays alive until the function returns."""
    gate = torch.sigmoid(a)
    scaled = gate * 2
    shifted = scaled - 1
    return shifted * b


CHAINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    # and how many tensors are kept
    "gelu_new": (lambda a, b: gelu_new(a), 1),
    "mish": (lambda a, b: a * torch.tanh(F.softplus(a)), 1),
    "quick gelu": (lambda a, b: a * torch.sigmoid(1.702 * a), 1),
    "swiglu": (lambda a, b: F.silu(a) * b, 2),
    "geglu, scaled": (lambda a, b: (F.gelu(a) * b) * 0.5 + 1, 2),
    "named steps": (named_steps, 2),
    "polynomial": (lambda a, b: a * a * a - 2 * a * a + 3 * a, 1),
    "product of two chains": (lambda a, b: torch.tanh(a) * torch.sigmoid(b), 2),
    "sum over common roots": (lambda a, b: F.silu(a) * b + torch.sigmoid(b) * a, 2),
    "difference of one root": (lambda a, b: torch.exp(-a.square()) - torch.tanh(a), 1),
    "cancelled": (lambda a, b: torch.tanh(a) + b - b, 1),
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(SHAPE, dtype=dtype, requires_grad=True), torch.randn(SHAPE, dtype=dtype, requires_grad=True)


def engine_of(bits: int = 32, **settings: Any) -> ActMemEngine:
    return ActMemEngine(bits=bits, activations="derivative", **settings)


def saved_bytes(engine: ActMemEngine) -> int:
    engine.ledger.settle()
    return engine.ledger.live_saved_bytes


def raw_bytes(engine: ActMemEngine) -> int:
    engine.ledger.settle()
    return engine.ledger.live_raw_bytes


def gradients(
    compute: Callable[[Tensor, Tensor], Tensor], roots: tuple[Tensor, ...], engine: ActMemEngine | None
) -> tuple[Tensor | None, ...]:
    a, b = (root * 1 for root in roots)
    if engine is None:
        out = compute(a, b)
    else:
        with engine.compress():
            out = compute(a, b)
    return torch.autograd.grad(
        out, roots, torch.linspace(-1, 1, out.numel()).view(out.shape).to(out), allow_unused=True
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
    x = inputs()[0] * 1
    with engine.compress():
        held = [torch.sin(x * scale) for scale in range(1, 12)]
        assert len(engine._store.deferred.waiting) <= 5
        assert len(engine._method._open) <= 4  # type: ignore[union-attr]
    assert len(engine._store.deferred.waiting) == len(engine._method._open) == 0  # type: ignore[union-attr]
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivatives_have_the_dtype_of_the_operation(dtype: torch.dtype) -> None:
    engine = engine_of()
    x = torch.randn(SHAPE, requires_grad=True)
    with engine.compress():
        half = x.to(dtype)
        out = F.silu(half) * half
    assert out.dtype == dtype
    assert saved_bytes(engine) == BYTES // 2
    (grad,) = torch.autograd.grad(out.sum(), x)
    (plain,) = torch.autograd.grad((F.silu(x) * x).sum(), x)
    assert grad.dtype == torch.float32
    assert float((grad - plain).abs().max()) < 0.1


def test_under_autocast() -> None:
    """Where autocast changes the dtype, a chain begins anew and gradients have their root's dtype."""
    layer = nn.Linear(256, 256)
    x = torch.randn(SHAPE)
    results = []
    for engine in (None, engine_of()):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if engine is None:
                out = F.gelu(torch.tanh(layer(x)) ** 3)
            else:
                with engine.compress(layer, inputs=x):
                    out = F.gelu(torch.tanh(layer(x)) ** 3)
        out.float().sum().backward()
        results.append((out.dtype, layer.weight.grad.clone()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.5)


def test_nothing_changes_without_gradient() -> None:
    engine = engine_of()
    x = torch.randn(SHAPE)
    with engine.compress():
        F.gelu(x)
        with torch.no_grad():
            out = F.gelu(x.requires_grad_() * 1)
    assert not out.requires_grad
    assert engine.ledger.sites == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_it_steps_aside(reentrant: bool) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    (plain,) = torch.autograd.grad(gelu_new(x * 1).sum(), x)
    engine = engine_of()
    with engine.compress():
        loss = checkpoint(gelu_new, x * 1, use_reentrant=reentrant).sum()
    assert not any(site.role == "derivative" for site in engine.ledger.sites)
    loss.backward()
    assert torch.equal(x.grad, plain)


def test_other_hooks_and_pauses_are_respected() -> None:
    engine = engine_of()
    x = torch.randn(SHAPE, requires_grad=True)
    with engine.compress():
        with torch.autograd.graph.save_on_cpu():
            F.gelu(x * 1)
        with engine.paused():
            F.gelu(x * 1)
    assert engine.ledger.sites == {}


@pytest.mark.parametrize(
    ("mode", "function", "name"),
    [("derivative", F.gelu, "gelu"), ("derivative", lambda x: F.silu(x) * x, "mul"), ("inverted", F.silu, "silu")],
)
def test_double_backward_is_refused(mode: str, function: Callable[[Tensor], Tensor], name: str) -> None:
    """Already where the graph for it would be made: later, a part of it might be left out without an error."""
    x = torch.randn(SHAPE, requires_grad=True)
    with ActMemEngine(bits=32, activations=mode).compress():
        loss = function(x * 1).sum()
    with pytest.raises(ActMemError, match=rf"backward of {name} with create_graph=True.*exact=\['op:{name}'\]"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_an_excluded_operation_can_be_differentiated_twice() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with ActMemEngine(bits=4, activations="derivative", exact=["op:gelu"]).compress():
        loss = F.gelu(x * 1).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert float(second.abs().max()) > 0.5


def test_a_retained_graph_gives_the_same_twice() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    engine = engine_of(2)
    with engine.compress():
        loss = gelu_new(x * 1).sum()
        inside = torch.autograd.grad(loss, x, retain_graph=True)[0]
    outside = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    assert all(torch.equal(inside, grad) for grad in outside)


@pytest.mark.parametrize("observe", ["retain_grad", "hook"])
def test_gradients_of_observed_intermediates(observe: str) -> None:
    """A chain does not go past a result whose gradient somebody has asked for."""
    seen: list[Tensor] = []
    x = torch.randn(SHAPE, requires_grad=True)
    with engine_of().compress():
        middle = torch.tanh(x * 1)
        if observe == "retain_grad":
            middle.retain_grad()
        else:
            middle.register_hook(seen.append)
        out = F.gelu(middle)
    out.sum().backward()
    grad = middle.grad if observe == "retain_grad" else seen[0]
    leaf = middle.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
    assert grad is not None
    torch.testing.assert_close(grad, expected)


def changed_root(x: Tensor) -> Tensor:
    z = x * 1
    out = torch.tanh(z)
    z.mul_(3)
    return out * 2 + z


def changed_result(x: Tensor) -> Tensor:
    out = F.silu(x * 1)
    out.mul_(2).add_(1)
    return torch.sin(out)


def changed_factor(x: Tensor) -> Tensor:
    wave = torch.sin(x * 1)
    out = wave * x.clone()
    wave.zero_()
    return out * 3


def in_place_activation(x: Tensor) -> Tensor:
    return torch.tanh(F.silu(x * 1 + 0.5, inplace=True) * 2)


@pytest.mark.parametrize("compute", [changed_root, changed_result, in_place_activation])
@pytest.mark.parametrize("bits", [32, 4])
def test_changes_in_place_are_noticed(compute: Callable[[Tensor], Tensor], bits: int) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    (plain,) = torch.autograd.grad(compute(x).sum(), x)
    with engine_of(bits, rounding="dither").compress():
        out = compute(x)
    (packed,) = torch.autograd.grad(out.sum(), x)
    error = float((packed - plain).square().mean() / plain.square().mean())
    assert error < (1e-10 if bits == 32 else 0.05)


def test_a_factor_changed_in_place_is_refused_or_was_copied() -> None:
    """As in plain autograd when it is kept by reference; what was packed before is right all the same."""
    x = torch.randn(SHAPE, requires_grad=True)
    with engine_of().compress():
        out = changed_factor(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    leaf = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((torch.sin(leaf) * leaf * 3).sum(), leaf)
    with engine_of(8).compress():
        out = changed_factor(x)
    (packed,) = torch.autograd.grad(out.sum(), x)
    assert float((packed - expected).square().mean() / expected.square().mean()) < 1e-3


def test_weights_broadcasts_and_small_tensors_are_left_alone() -> None:
    scale, shift = nn.Parameter(torch.randn(256)), nn.Parameter(torch.randn(SHAPE))
    x = torch.randn(SHAPE, requires_grad=True)
    engine = engine_of()
    with engine.compress():
        z = x * 1
        out = z * scale, F.softplus(shift), z + shift, z * z.mean(-1, keepdim=True), F.gelu(z[:2, :8])
    assert all(o.requires_grad for o in out)
    assert not any(site.role == "derivative" for site in engine.ledger.sites)


@pytest.mark.parametrize("settings", [{"exact": ("op:gelu",)}, {"exact": ("0",)}, {"min_elements": 1 << 20}])
def test_patterns_and_sizes_that_stay_exact(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.GELU())
    engine = engine_of(2, **settings)
    with engine.compress(model):
        model(torch.randn(SHAPE, requires_grad=True) * 1)
    ((site, row),) = engine.ledger.sites.items()
    assert (site.role, row.codec) == ("input", "exact")


def test_what_a_loss_computes_stays_exact() -> None:
    class MyLoss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(x).mean()

    engine = engine_of(2)
    with engine.compress(model := nn.Sequential(MyLoss())):
        model(torch.randn(SHAPE, requires_grad=True) * 1)
    assert {row.kind for row in engine.ledger.sites.values()} == {"loss"}


def test_a_lasting_result_does_not_keep_its_graph_beyond_the_step() -> None:
    """The map of results that a chain may go on from must not outlive the step."""
    x = torch.randn(SHAPE, requires_grad=True)
    engine = engine_of()
    with engine.compress():
        out = gelu_new(x * 1)
    out = out.detach()
    assert saved_bytes(engine) == raw_bytes(engine) == 0


def test_the_default_mode_replaces_attention_alone() -> None:
    assert list(ActMemEngine()._tracker.replacements) == [F.scaled_dot_product_attention]
    assert ActMemEngine()._method is None


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


@pytest.mark.gpu
def test_on_a_stream_of_its_own() -> None:
    """A derivative is encoded later than it was computed, but on the stream that has computed it."""
    x = torch.randn(1 << 20, device="cuda", requires_grad=True)
    (plain,) = torch.autograd.grad(gelu_new(x).sum(), x)
    side = torch.cuda.Stream()
    for bits, tolerance in ((32, 1e-5), (8, 0.02)):
        engine = engine_of(bits)
        with engine.compress():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = gelu_new(x * 1)
            torch.cuda.current_stream().wait_stream(side)
            total = out.sum()
        (grad,) = torch.autograd.grad(total, x)
        assert float((grad - plain).abs().max()) < tolerance


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
