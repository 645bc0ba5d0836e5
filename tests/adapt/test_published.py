"""ActNN's and GACT's constants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine
from lightning_actmem_kernels import CodecSpec
from tests import models


def adapted(method: str, model: nn.Module, x: Tensor, **config: object) -> ActMemEngine:
    engine = ActMemEngine(method=method, bits=3, **config)  # type: ignore[arg-type]
    assert engine.adapter is not None
    parts = x.chunk(2)
    closures = [lambda part=part: F.cross_entropy(model(part), torch.arange(len(part)) % 10) for part in parts]
    engine.adapter.measure(model, closures, inputs=list(parts))
    return engine


@pytest.mark.parametrize("method", ["actnn", "gact"])
def test_every_site_is_known_at_once_and_gets_a_published_codec(method: str) -> None:
    engine = adapted(method, models.mlp(depth=2), torch.randn(256, 128))
    assert engine.adapter is not None
    assert set(engine.adapter.sensitivities.averages) == set(engine.adapter.sizes.uses) != set()
    engine.adapter.allocate()
    specs = {spec for spec in engine.plan.values() if spec is not None}
    assert {(spec.codec, spec.rounding) for spec in specs} == {("uniform", "stochastic")}
    assert len({spec.bits for spec in specs}) > 1


def test_the_law_is_that_of_the_levels() -> None:
    adapter = adapted("gact", models.mlp(depth=1), torch.randn(256, 128)).adapter
    assert adapter is not None
    site = next(iter(adapter.sensitivities.averages))
    one, four = (
        adapter._law.variance(adapter.sensitivities, site, CodecSpec("uniform", bits, rounding="stochastic"))
        for bits in (1, 4)
    )
    assert one is not None
    assert four == pytest.approx(one / 225)
    assert adapter._law.variance(adapter.sensitivities, site, CodecSpec("uniform", 4)) is None
    assert adapter._law.variance(adapter.sensitivities, site, None) == 0.0


def test_gact_takes_three_passes_for_each_site() -> None:
    engine = adapted("gact", models.mlp(depth=1), torch.randn(256, 128))
    assert engine.adapter is not None
    measured = engine.adapter.sensitivities.averages
    assert all(list(by_spec) == [CodecSpec("uniform", 1, rounding="stochastic")] for by_spec in measured.values())


def test_actnn_is_the_range_law_on_a_linear_layer() -> None:
    """C = sum_t |g_t|^2 sum_c R^2 / 6."""
    first, last = nn.Linear(64, 256), nn.Linear(256, 10, bias=False)
    x = torch.randn(64, 64)
    engine = adapted("actnn", nn.Sequential(first, last), x, derive=False)
    assert engine.adapter is not None
    constants = []
    for part in x.chunk(2):
        hidden = first(part)
        out = last(hidden)
        out.retain_grad()
        F.cross_entropy(out, torch.arange(32) % 10).backward()
        assert out.grad is not None
        squares = (hidden.amax(1) - hidden.amin(1)).square() * 256  # a row is a group
        constants.append((squares * out.grad.square().sum(1)).sum().item() / 6)
    (by_spec,) = engine.adapter.sensitivities.averages.values()
    noise = by_spec[CodecSpec("uniform", 1, rounding="stochastic")].value
    found = noise * engine.adapter.gradient_variance
    # The probe keeps the tensor at 8 bits.
    assert found == pytest.approx(sum(constants) / 2, rel=0.02)
