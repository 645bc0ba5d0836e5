"""The closed form against Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem.adapt.replay import ExactGradient, Replay
from lightning_actmem.saved.site import Site
from lightning_actmem_kernels import CodecSpec

# Monte Carlo's mean has a standard error below 1 %.
TOLERANCE = 0.03
DRAWS = 100
SPECS = [CodecSpec("rotated", 1), CodecSpec("rotated", 2), CodecSpec("uniform", 3)]


class Three(nn.Module):
    """Three projections of one tensor, as attention has them."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(96, width) for width in (16, 32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return sum(projection(x).square().mean() for projection in self.projections)


class OnActivation(nn.Module):
    """A layer on an activation that needs a gradient."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        # Multiplication by one is exact and saves what is too small to be packed, or the batch.
        out = self.layer(x * self.scale)
        return out if out.dim() == 0 else (out * torch.linspace(0.1, 3, out.shape[-1])).square().mean()


def probed(model: nn.Module, x: Tensor, **config: object) -> tuple[Replay, ExactGradient]:
    engine = ActMemEngine(min_elements=4096, derive=False, **config)  # type: ignore[arg-type]
    replay = engine.probe(lambda: model(x), model, inputs=x)
    exact = ExactGradient([parameter for parameter in model.parameters() if parameter.requires_grad])
    exact.take(replay)
    return replay, exact


def closed_form(replay: Replay, specs: list[CodecSpec]) -> dict[Site, dict[CodecSpec, float]]:
    """The variances, averaged over draws of the elements' errors."""
    draws = []
    for _ in range(8):
        replay._rounding.choose({})
        draws.append(replay.closed_form.variances(lambda _: specs))
    return {site: {spec: sum(d[site][spec].item() for d in draws) / len(draws) for spec in specs} for site in draws[0]}


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(96, 40), (300, 96), 96),
    "linear on sequences": (lambda: nn.Linear(96, 40, bias=False), (8, 50, 96), 96),
    "three projections": (Three, (8, 50, 96), 96),
    "conv1d": (lambda: nn.Conv1d(12, 20, 5, padding=2), (16, 12, 128), 128),
    "conv2d": (lambda: nn.Conv2d(12, 20, 3, padding=1), (8, 12, 24, 24), 24),
    "strided": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (8, 12, 25, 24), 24),
    "dilated, in groups": (lambda: nn.Conv2d(12, 24, 3, dilation=2, groups=3), (8, 12, 24, 24), 24),
    "depthwise": (lambda: nn.Conv2d(12, 12, 5, stride=(1, 2), padding=(2, 1), groups=12), (8, 12, 24, 24), 24),
    "conv3d": (lambda: nn.Conv3d(6, 10, 3, padding=1), (4, 6, 8, 10, 12), 12),
}


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_is_what_monte_carlo_finds(name: str) -> None:
    build, size, channels = CASES[name]
    # Rows of all sizes. Heavy tails within a group would leave the rotated codec a bias, see rotated.py.
    model, x = OnActivation(build(), channels), torch.randn(size) * torch.rand(size[0], *[1] * (len(size) - 1)).exp()
    replay, exact = probed(model, x)
    (found,) = [item for item in closed_form(replay, SPECS).items() if item[0].role == "input"]
    site, variances = found
    for spec, variance in variances.items():
        drawn = torch.stack([exact.error(replay, {site: spec}) for _ in range(DRAWS)]).mean()
        assert variance == pytest.approx(drawn.item(), rel=TOLERANCE), spec


def test_channels_last() -> None:
    model = OnActivation(nn.Conv2d(16, 20, 3, padding=1), 24).to(memory_format=torch.channels_last)
    x = torch.randn(8, 16, 24, 24).to(memory_format=torch.channels_last)
    replay, exact = probed(model, x)
    ((site, variances),) = closed_form(replay, SPECS).items()
    drawn = torch.stack([exact.error(replay, {site: SPECS[1]}) for _ in range(DRAWS)]).mean()
    assert variances[SPECS[1]] == pytest.approx(drawn.item(), rel=TOLERANCE)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_relu_before_a_convolution_reads_an_exact_sign(bits: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.Flatten(), nn.Linear(8000, 4))
    x, spec = torch.randn(8, 3, 24, 24), CodecSpec("relu", bits)
    engine = ActMemEngine(derive=False)
    replay = engine.probe(lambda: model(x).square().mean(), model, inputs=x)
    exact = ExactGradient(list(model.parameters()))
    exact.take(replay)
    variances = closed_form(replay, [spec])
    site = Site("1", "relu", "result", 0)
    drawn = torch.stack([exact.error(replay, {site: spec}) for _ in range(DRAWS)]).mean()
    assert variances[site][spec] == pytest.approx(drawn.item(), rel=TOLERANCE)


def test_what_something_else_reads_too_has_no_closed_form() -> None:
    """Here the first layer's gradient depends on the stored tensor as well, through the activation."""
    fc = nn.Linear(64, 64)

    def loss() -> Tensor:
        h = fc(x)
        return (fc(h) + F.gelu(h)).square().sum()

    x = torch.randn(128, 64)
    engine = ActMemEngine(derive=False)
    replay = engine.probe(loss, fc, inputs=x)
    ExactGradient(list(fc.parameters())).take(replay)
    assert replay.uses
    assert replay.closed_form.variances(lambda _: SPECS) == {}


def test_a_frozen_layer_costs_nothing_and_is_not_followed() -> None:
    model = OnActivation(nn.Linear(96, 40), 96)
    model.layer.requires_grad_(False)
    replay, _ = probed(model, torch.randn(300, 96))
    assert replay.closed_form.variances(lambda _: SPECS) == {}


def test_under_autocast_the_input_is_not_taken_for_its_copy() -> None:
    """The activation stores the input, the layer a bfloat16 copy of it: neither is read by linear layers alone."""
    first, last = nn.Linear(96, 96), nn.Linear(96, 96)
    model, x = nn.Sequential(first, last), torch.randn(128, 96)

    def loss() -> Tensor:
        h = first(x).float()
        return (F.gelu(h) + last(h)).square().mean()

    engine = ActMemEngine(derive=False)
    with torch.autocast("cpu", torch.bfloat16):
        replay = engine.probe(loss, model, inputs=x)
    ExactGradient(list(model.parameters())).take(replay)
    (site,) = (site for site in replay.uses if site.operation == "gelu")
    assert site not in replay.closed_form.variances(lambda _: SPECS)
