"""The adapter: measuring, allocating, its state, and the settings that ask for it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_actmem import ActMemEngine, ActMemWarning
from lightning_actmem.adapt.adapter import Adapter
from lightning_actmem.adapt.measurement import Measurement
from lightning_actmem_kernels import CodecSpec
from tests import models


class Training:
    """An MLP on fixed data, with an engine that adapts."""

    def __init__(self, **config: Any) -> None:
        torch.manual_seed(1)
        self.model = models.mlp(depth=2)
        self.x, self.y = torch.randn(256, 128), torch.randint(0, 10, (256,))
        self.engine = ActMemEngine(**config)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05)

    @property
    def adapter(self) -> Adapter:
        assert self.engine.adapter is not None
        return self.engine.adapter

    def loss(self, part: slice) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(self.model(self.x[part]), self.y[part])

    def step(self) -> None:
        with self.engine.compress(self.model, inputs=(self.x, self.y)):
            loss = self.loss(slice(0, 256))()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def measure(self, max_passes: int = 32, compact: bool = True) -> Measurement:
        parts = [slice(0, 64), slice(64, 128)]
        inputs = [(self.x[part], self.y[part]) for part in parts]
        return self.adapter.measure(
            self.model, list(map(self.loss, parts)), inputs=inputs, max_passes=max_passes, compact=compact
        )


def sure(training: Training) -> None:
    """Measure until everything is known."""
    training.step()
    for _ in range(3):
        training.measure()


def test_without_a_goal_the_bytes_stay_and_the_noise_falls() -> None:
    training = Training(bits=2, adapt=True)
    sure(training)
    before, stored_bytes = training.adapter.predicted_noise, training.engine.report().stored_bytes
    changes = training.adapter.allocate()
    assert changes
    after = training.adapter.predicted_noise
    assert before is not None
    assert after is not None
    assert after < 0.85 * before
    training.step()
    assert 0.9 * stored_bytes <= training.engine.report().stored_bytes <= stored_bytes
    training.measure()
    assert training.adapter.measured_noise == pytest.approx(after, rel=0.3)


@pytest.mark.parametrize("noise", [0.003, 0.1])
def test_a_noise_budget_is_kept_with_few_bytes(noise: float) -> None:
    training = Training(noise=noise)
    sure(training)
    training.adapter.allocate()
    predicted = training.adapter.predicted_noise
    assert predicted is not None
    assert noise / 3 < predicted <= noise
    training.measure()
    assert training.adapter.measured_noise is not None
    assert training.adapter.measured_noise < 1.2 * noise


def test_a_byte_budget_is_kept() -> None:
    reference = Training(bits=4)
    reference.step()
    budget = int(0.6 * reference.engine.report().stored_bytes)
    training = Training(budget=str(budget))
    sure(training)
    training.adapter.allocate()
    training.step()
    assert 0.9 * budget < training.engine.report().stored_bytes <= budget


def test_bytes_come_before_noise() -> None:
    training = Training(noise=1e-9, budget="200kB")
    sure(training)
    training.adapter.allocate()
    training.step()
    assert training.engine.report().stored_bytes <= 200_000


def test_a_budget_below_everything_is_the_least_there_is() -> None:
    training = Training(budget="1")
    sure(training)
    with pytest.warns(ActMemWarning, match=r"budget='1' asks for at most 1 bytes, and [\d,]+ is the least"):
        training.adapter.allocate()
    training.adapter.allocate()  # said once
    specs = training.engine.plan.values()
    assert all(spec is not None and spec.bits <= 2 for spec in specs)


def test_a_budget_is_not_given_up_before_one_bit_has_been_measured() -> None:
    """One bit is measured last: until then the least that there is has two, which is no reason to warn."""
    training = Training(budget="1")
    training.step()
    sites = len(training.adapter.sizes.uses)
    training.measure(max_passes=sites + 4)
    training.adapter.allocate()
    assert all(spec is not None and spec.bits == 2 for spec in training.engine.plan.values())
    sure(training)
    with pytest.warns(ActMemWarning, match="is the least there is"):
        training.adapter.allocate()


def test_what_has_not_been_measured_keeps_its_default() -> None:
    training = Training(bits=2, adapt=True)
    training.step()
    training.measure(max_passes=6)
    known = set(training.adapter.sensitivities.averages)
    assert 0 < len(known) < len(training.adapter.sizes.uses)
    training.adapter.allocate()
    assert set(training.engine.plan) == known


def test_changes_say_why() -> None:
    training = Training(bits=2, adapt=True)
    sure(training)
    for change in training.adapter.allocate():
        assert (
            change.before == CodecSpec("rotated", 2, centre=True) != change.after == training.engine.plan[change.site]
        )
        assert (change.noise_after < change.noise_before) == (change.bytes_after > change.bytes_before)
        only_groups = change.after is not None and change.after.label == "rotated-2"
        groups = " in groups of 256 with their mean" if only_groups else ""
        assert str(change).startswith(f"{change.site}: rotated-2{groups} -> ")


def test_passes_are_limited_and_go_round() -> None:
    training = Training(bits=2, adapt=True)
    training.step()
    measured = [set(training.measure(max_passes=8).errors) for _ in range(3)]
    assert measured[0].isdisjoint(measured[1])
    assert training.measure(max_passes=8).passes == 8


def test_a_compact_probe_measures_the_same_with_a_quarter_of_the_bytes() -> None:
    exact, compact = (Training(bits=2, adapt=True) for _ in range(2))
    measured, again = exact.measure(60, compact=False), compact.measure(60, compact=True)
    assert again.probe_bytes < 0.4 * measured.probe_bytes
    assert sum(again.totals) == pytest.approx(sum(measured.totals), rel=0.1)
    assert again.distances == pytest.approx(measured.distances, rel=0.01)


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    def train(training: Training, epochs: int) -> None:
        for _ in range(epochs):
            for _ in range(3):
                training.step()
            training.measure(max_passes=12)
            training.adapter.allocate()

    whole = Training(noise=0.05)
    train(whole, 4)
    first, second = Training(noise=0.05), Training(noise=0.05)
    train(first, 2)
    file = io.BytesIO()
    torch.save({"engine": first.engine.state_dict(), "model": first.model.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second.model.load_state_dict(state["model"])
    second.engine.load_state_dict(state["engine"])
    assert second.engine.state_dict() == first.engine.state_dict()
    train(second, 2)
    assert second.engine.state_dict() == whole.engine.state_dict()
    assert all(map(torch.equal, second.model.state_dict().values(), whole.model.state_dict().values()))


def test_ranks_that_gather_agree() -> None:
    """Each rank sees its own data; with the measurements joined they choose alike."""
    ranks = [Training(bits=2, adapt=True) for _ in range(2)]
    ranks[1].x = torch.randn(256, 128)
    for number, training in enumerate(ranks):
        training.engine.rank = number
        training.step()
    parts: list[Measurement] = []
    for training in ranks:
        training.adapter.gather = lambda part: (parts.append(copy.deepcopy(part)), [part])[1]
        training.measure()
    assert parts[0].totals != parts[1].totals
    for training in ranks:
        state = Training(bits=2, adapt=True).engine.state_dict()["adapter"]
        training.adapter.load_state_dict({**state, "sizes": training.adapter.sizes.state()})
        training.adapter.gather = lambda _: parts
        training.measure()
        training.adapter.allocate()
    assert ranks[0].engine.plan == ranks[1].engine.plan
    assert ranks[0].adapter.predicted_noise == ranks[1].adapter.predicted_noise


@pytest.mark.parametrize("activations", ["derive", "derivative", "inverted"])
def test_what_stands_in_for_an_activations_input_adapts_too(activations: str) -> None:
    training = Training(bits=2, adapt=True, activations=activations)
    sure(training)
    training.adapter.allocate()
    training.step()
    training.measure(60)
    assert training.adapter.measured_noise == pytest.approx(training.adapter.expected_noise, rel=0.3)
    assert set(training.engine.plan) == set(training.adapter.sizes.uses)


def test_attention_keeps_its_floor() -> None:
    model, ids = models.gpt2(dropout=0.0), torch.randint(0, 256, (8, 64))
    engine = ActMemEngine(bits=2, adapt=True)
    closures = [lambda part=part: model(input_ids=part, labels=part).loss for part in ids.chunk(2)]
    assert engine.adapter is not None
    for _ in range(2):
        engine.adapter.measure(model, closures, inputs=list(ids.chunk(2)))
    engine.adapter.allocate()
    attention = {site: spec for site, spec in engine.plan.items() if site.operation == "scaled_dot_product_attention"}
    values = [spec for site, spec in attention.items() if site.role == "value"]
    others = [spec for site, spec in attention.items() if site.role != "value"]
    assert len(others) == 2 * len(values) > 0
    assert all(spec is None or spec.bits >= 8 for spec in others)
    assert any(spec is not None and spec.bits < 8 for spec in values)


def test_the_noise_of_layers_with_bits_of_their_own_is_counted() -> None:
    """At 8 bits elsewhere it is all that there is, in the prediction and in the measurement."""
    without, training = Training(bits=8, adapt=True), Training(bits=8, adapt=True, layer_bits={"0": 1})
    for each in (without, training):
        each.step()
        each.measure(60)
        each.measure(60)
    noises = [
        (each.adapter.predicted_noise, each.adapter.measured_noise, each.adapter.expected_noise)
        for each in (without, training)
    ]
    assert all(of_pinned > 50 * of_others > 0 for of_others, of_pinned in zip(*noises, strict=True))
    assert training.adapter.measured_noise == pytest.approx(training.adapter.expected_noise, rel=0.3)


def test_layers_with_bits_of_their_own_take_their_part_of_the_budget() -> None:
    training = Training(noise=0.05, layer_bits={"0": 2})
    sure(training)
    training.adapter.allocate()
    adapter = training.adapter
    pinned = {site for site, use in adapter.sizes.uses.items() if use.pinned}
    assert pinned
    assert all(site.layer.split(".")[0] == "0" for site in pinned)
    assert pinned.isdisjoint(training.engine.plan)
    own = sum(adapter._noise_of(site, CodecSpec("rotated", 2, centre=True)) or 0.0 for site in pinned)
    assert adapter.predicted_noise is not None
    assert 0 < own < adapter.predicted_noise <= 0.05
    training.step()
    assert all(training.engine.ledger.sites[site].codec == "rotated-2" for site in pinned)
    state = training.engine.state_dict()
    for layer_bits, kept in (({"0": 2}, True), ({"0": 4}, False)):
        resumed = Training(noise=0.05, layer_bits=layer_bits)
        resumed.engine.load_state_dict(state)
        assert (resumed.engine.plan == training.engine.plan) is kept
        assert (resumed.adapter.sizes.uses == adapter.sizes.uses) is kept


def test_one_part_is_not_enough() -> None:
    training = Training(adapt=True)
    with pytest.raises(ValueError, match="at least 2 losses on different parts of a batch, got 1"):
        training.adapter.measure(training.model, [training.loss(slice(0, 64))])
    with pytest.raises(ValueError, match="max_passes must be above 4 for 2 closures, got 4"):
        training.measure(max_passes=4)


def test_a_smaller_last_batch_does_not_set_the_sizes() -> None:
    training = Training(adapt=True)
    training.step()
    sizes = copy.deepcopy(training.adapter.sizes.uses)
    training.x, training.y = training.x[:64], training.y[:64]
    with training.engine.compress(training.model, inputs=(training.x, training.y)):
        training.loss(slice(0, 64))()
    assert training.adapter.sizes.uses == sizes


def test_an_overflow_changes_nothing() -> None:
    training = Training(adapt=True)
    training.step()
    training.measure()
    before = training.engine.state_dict()["adapter"]
    with torch.no_grad():
        training.model[0].up.weight[0, 0] = torch.inf
    assert not training.measure().is_finite
    assert training.engine.state_dict()["adapter"] == {**before, "count": 2}


def test_no_adapter_without_being_asked() -> None:
    assert ActMemEngine().adapter is None
    assert ActMemEngine(noise=0.1).adapter is not None
    assert "adapter" not in ActMemEngine().state_dict()


def test_a_plan_can_be_set_by_hand() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), torch.randn(64, 64)
    engine = ActMemEngine(bits=2)
    with engine.compress(model, inputs=x):
        model(x).sum().backward()
    site = next(site for site, row in engine.ledger.sites.items() if row.codec == "rotated-2")
    engine.plan = {site: CodecSpec("uniform", 8)}
    with engine.compress(model, inputs=x):
        model(x).sum().backward()
    assert engine.ledger.sites[site].codec == "uniform-8"
    resumed = ActMemEngine(bits=2)
    resumed.load_state_dict(engine.state_dict())
    assert resumed.plan == engine.plan
    adaptive = ActMemEngine(bits=2, adapt=True)
    adaptive.load_state_dict(engine.state_dict())
    assert adaptive.plan == {}


def test_a_run_that_no_longer_adapts_has_no_plan() -> None:
    training = Training(bits=2, adapt=True)
    sure(training)
    training.adapter.allocate()
    plain = ActMemEngine(bits=2)
    plain.load_state_dict(training.engine.state_dict())
    assert plain.plan == {}
    again = ActMemEngine(bits=2, adapt=True)
    again.load_state_dict(training.engine.state_dict())
    assert again.plan == training.engine.plan != {}


def test_a_noise_below_everything_says_so() -> None:
    training = Training(noise=1e-9, activations="derivative")
    sure(training)
    with pytest.warns(ActMemWarning, match="noise=1e-09 is asked for, and .* is the least there is"):
        training.adapter.allocate()
    training.adapter.allocate()  # said once


@pytest.mark.parametrize(
    "other", [{"group_size": 64}, {"rounding": "stochastic"}, {"codec": "uniform"}, {"bits": 4}], ids=str
)
def test_what_was_measured_under_other_settings_is_dropped(other: dict[str, Any]) -> None:
    training = Training(bits=2, adapt=True)
    sure(training)
    training.adapter.allocate()
    state = training.engine.state_dict()
    resumed = ActMemEngine(**{"bits": 2, "adapt": True, **other})
    resumed.load_state_dict(state)
    assert resumed.step == training.engine.step
    assert resumed.plan == {}
    assert resumed.adapter is not None
    assert resumed.adapter.count == 0
    assert resumed.adapter.sensitivities.averages == {}


def test_another_goal_takes_over_what_was_measured() -> None:
    training = Training(noise=0.1)
    sure(training)
    training.adapter.allocate()
    resumed = ActMemEngine(noise=0.05)
    resumed.load_state_dict(training.engine.state_dict())
    assert resumed.plan == training.engine.plan
    assert resumed.state_dict() == training.engine.state_dict()


def test_nothing_to_measure_is_an_error() -> None:
    training = Training(noise=0.1, min_elements=10**6)
    training.step()
    with pytest.raises(ValueError, match="min_elements=1000000 or more, got none"):
        training.measure()
