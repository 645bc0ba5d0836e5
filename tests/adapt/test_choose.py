"""The codec that every site chooses for itself: the right one, once, without waiting for the device, and resumable."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_actmem import ActMemEngine
from lightning_actmem.adapt import choose
from lightning_actmem.adapt.choose import CodecChooser
from lightning_actmem.saved.identify import Verdict
from lightning_actmem.saved.site import Site
from lightning_actmem_kernels import CodecSpec, Layout, decode, encode

SITE = Site("layer", "gelu", "input", 0)
SETTINGS = (2, 8, 32, 256, "dither")


def chosen(x: Tensor, spec: CodecSpec) -> CodecSpec | None:
    chooser = CodecChooser(SETTINGS, None)
    layout = Layout.of(x)
    assert layout is not None
    chooser.put(x, layout, SITE, Verdict("gelu", "input", "packed", spec), spec)
    return chooser.read().get(SITE)


@pytest.mark.parametrize(
    ("x", "bits", "codec", "centre"),
    [
        (torch.randn(1 << 16), 2, "rotated", False),
        (torch.randn(1 << 16) + 100, 2, "rotated", True),
        (torch.rand(1 << 16), 4, "uniform", False),
        (torch.where(torch.arange(1 << 16) % 256 == 7, 2.0**14, torch.randn(1 << 16)), 8, "fp8_e4m3", False),
    ],
    ids=["normal", "far from zero", "even", "outliers"],
)
def test_each_kind_of_tensor_has_its_codec(x: Tensor, bits: int, codec: str, centre: bool) -> None:
    spec = chosen(x, CodecSpec("uniform", bits))
    assert spec is not None
    assert (spec.codec, spec.bits, spec.centre) == (codec, bits, centre)


def test_no_other_codec_has_less_error_for_its_bytes() -> None:
    x = torch.randn(1 << 16) ** 3
    for bits in (1, 2, 3, 4, 8):
        scores: dict[CodecSpec, float] = {}
        for spec in choose._candidates(CodecSpec("uniform", bits)):
            back = decode(encode(x, spec, key=3), spec, numel=x.numel(), dtype=x.dtype, key=3)
            bits_per_element = 8 * spec.stored_bytes(x.numel(), x.dtype) / x.numel()
            scores[spec] = float((back - x).square().sum()) * 4**bits_per_element
        best = chosen(x, CodecSpec("uniform", bits))
        assert best is not None
        assert scores[best] < 1.02 * min(scores.values())  # other noise than was measured with


@pytest.mark.parametrize("spec", [CodecSpec("relu", 4), CodecSpec("two_valued"), None], ids=str)
def test_what_its_operation_needs_is_left_alone(spec: CodecSpec | None) -> None:
    chooser = CodecChooser(SETTINGS, None)
    x = torch.rand(4096)
    layout = Layout.of(x)
    assert layout is not None
    chooser.put(x, layout, SITE, Verdict("relu", "result", "packed", spec), spec)
    assert chooser.read() == {}


def test_a_tensor_that_is_not_finite_tells_nothing_and_the_next_one_is_measured() -> None:
    chooser, spec = CodecChooser(SETTINGS, None), CodecSpec("uniform", 2)
    for x, known in ((torch.full((4096,), torch.inf), False), (torch.randn(4096), True)):
        layout = Layout.of(x)
        assert layout is not None
        chooser.put(x, layout, SITE, Verdict("gelu", "input", "packed", spec), spec)
        assert (SITE in chooser.read()) == known


def test_zeros_keep_the_codec_that_they_have() -> None:
    assert chosen(torch.zeros(4096), CodecSpec("uniform", 4)) == CodecSpec("uniform", 4)


@pytest.mark.parametrize("numel", [1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (1 << 22) + 77])
def test_pieces_cover_little_of_a_large_tensor_and_all_of_a_small_one(numel: int) -> None:
    flat = torch.arange(numel)
    pieces = list(choose._pieces(flat, 256))
    assert all(piece[0] % 256 == 0 for piece in pieces)
    assert sum(len(piece) for piece in pieces) == min(numel, 1 << 20)
    assert pieces[0][0] == 0
    assert numel - pieces[-1][-1] <= 256
    assert pieces[0].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


# ---------------------------------------------------------------- in the engine


class Net(nn.Module):
    """A site far from zero, a ReLU and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 8)
        nn.init.constant_(self.up.bias, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(x))
        x = F.relu(self.mid(x))
        x = F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        return self.down(x)


def gradients(engine: ActMemEngine, model: nn.Module, steps: int) -> list[Tensor]:
    found = []
    for _ in range(steps):
        torch.manual_seed(engine.step)
        x = torch.randn(64, 64)
        with engine.compress(model, inputs=x):
            loss = model(x).square().mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return found


def test_the_second_step_stores_by_what_the_first_one_has_shown() -> None:
    engine, model = ActMemEngine(codec="measured", bits=2, min_elements=0), Net()
    gradients(engine, model, 1)
    first = {row.codec for row in engine.report().rows}
    gradients(engine, model, 1)
    plan = engine._store.plan
    assert {spec.codec for spec in plan.values() if spec is not None} <= {"rotated", "uniform", "bfp", "fp8_e4m3"}
    centred = [site for site, spec in plan.items() if spec is not None and spec.centre]
    assert any(site.operation == "gelu" for site in centred)
    assert "relu-2" in first
    assert not any(site.operation == "relu" for site in plan)
    assert {spec.bits for spec in plan.values() if spec is not None} == {2, 8}  # attention has its own width


def test_it_lowers_the_error_of_the_gradient() -> None:
    """At 3 bits `auto` takes min-max groups; for a normal distribution rotation has two thirds of their error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    errors = {}
    for codec in ("auto", "measured"):
        engine = ActMemEngine(codec=codec, bits=3, min_elements=0)
        exact = gradients(ActMemEngine(bits=32), model, 12)
        pairs = list(zip(exact, gradients(engine, model, 12), strict=True))[2:]
        errors[codec] = sum(float((a - b).square().sum()) for a, b in pairs)
    assert errors["measured"] < 0.8 * errors["auto"]


def test_a_resumed_run_is_bit_equal() -> None:
    torch.manual_seed(0)
    model = Net()
    wanted = gradients(ActMemEngine(codec="measured", bits=2, min_elements=0), model, 4)
    for cut in (1, 2):
        first = ActMemEngine(codec="measured", bits=2, min_elements=0)
        gradients(first, model, cut)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = ActMemEngine(codec="measured", bits=2, min_elements=0)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert all(map(torch.equal, gradients(second, model, 4 - cut), wanted[cut:]))


def test_choices_of_other_settings_are_not_taken_over() -> None:
    model = Net()
    first = ActMemEngine(codec="measured", bits=2, min_elements=0)
    gradients(first, model, 1)
    other = ActMemEngine(codec="measured", bits=4, min_elements=0)
    other.load_state_dict(first.state_dict())
    gradients(other, model, 1)
    assert other._store.plan == {}


class Reads(TorchDispatchMode):
    """Counts the times that the host waits for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in {"_local_scalar_dense", "equal", "nonzero", "is_nonzero"}
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing_while_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self.numel()) or read(self))
    engine, model = ActMemEngine(codec="measured", bits=2, min_elements=0), Net()
    counted = []
    for _ in range(3):
        with Reads() as mode:
            gradients(engine, model, 1)
        counted.append((mode.count, len(reads)))
    assert [count for count, _ in counted] == [0, 0, 0]
    assert [count for _, count in counted] == [0, 1, 1]  # once, when the second step begins


def test_measuring_needs_little_memory() -> None:
    """Beside a large tensor, its measurement allocates a few pieces of a quarter of a million elements at most."""
    from torch.profiler import ProfilerActivity, profile

    x, spec = torch.randn(1 << 22), CodecSpec("uniform", 8)
    layout = Layout.of(x)
    assert layout is not None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        CodecChooser(SETTINGS, None).put(x, layout, SITE, Verdict("gelu", "input", "packed", spec), spec)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < x.nbytes
