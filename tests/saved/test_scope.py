"""Layer paths: right inside every call, gone after the step, and invisible to copies."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lightning_actmem.saved.scope import LayerScope, is_compiled


class Probe(nn.Module):
    """Notes the layer path it runs under."""

    def __init__(self, scope: LayerScope, fail: bool = False) -> None:
        super().__init__()
        self.scope = [scope]
        self.fail = fail
        self.seen: list[str] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.seen.append(self.scope[0].stack[-1].layer)
        if self.fail:
            raise ValueError("stop")
        return x * scale


@contextmanager
def never() -> Iterator[None]:
    pytest.fail("a module that is not compiled was suspended")
    yield


@pytest.fixture
def scope() -> LayerScope:
    return LayerScope(never)


def test_paths_inside_nested_repeated_and_shared_calls(scope: LayerScope) -> None:
    shared = Probe(scope)
    model = nn.Sequential(shared, nn.Sequential(Probe(scope), shared))
    with scope.installed(model):
        model(torch.ones(1))
        model(torch.ones(1))
        assert scope.stack[-1].layer == ""
    assert shared.seen == ["0"] * 4  # its first name
    assert model[1][0].seen == ["1.0"] * 2


def test_nothing_is_left_on_the_modules_even_after_an_exception(scope: LayerScope) -> None:
    model = nn.Sequential(nn.Linear(1, 1), Probe(scope, fail=True))
    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match="stop"), scope.installed(model):
        model(torch.ones(1))
    assert [set(vars(module)) for module in model.modules()] == before
    assert scope.stack[-1].layer == ""


def test_the_path_is_right_again_after_a_caught_exception(scope: LayerScope) -> None:
    model = nn.Sequential(Probe(scope, fail=True))
    with scope.installed(model):
        with pytest.raises(ValueError, match="stop"):
            model(torch.ones(1))
        assert scope.stack[-1].layer == ""


def test_a_forward_of_the_users_own_on_the_instance_runs_and_comes_back(scope: LayerScope) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    own = model[0].forward = lambda x: x + 1  # type: ignore[assignment]
    with scope.installed(model):
        assert model(torch.zeros(1)).item() == 1
    assert vars(model[0])["forward"] is own


def test_a_forward_put_on_top_during_the_step_stays(scope: LayerScope) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    with scope.installed(model):
        model[0].forward = on_top = lambda x: x  # type: ignore[assignment]
    assert vars(model[0])["forward"] is on_top


def test_modules_added_or_replaced_between_steps_are_followed(scope: LayerScope) -> None:
    model = nn.Sequential(Probe(scope))
    with scope.installed(model):
        model(torch.ones(1))
    model.append(Probe(scope))
    model[0] = Probe(scope)
    with scope.installed(model):
        model(torch.ones(1))
    assert (model[0].seen, model[1].seen) == (["0"], ["1"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_made_inside_a_step_runs_its_own_weights(scope: LayerScope, clone) -> None:
    """An EMA or target network deep-copied in training_step once ran the original's forward for ever after."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with scope.installed(model):
        twin = clone(model)
    with torch.no_grad():
        twin[0].weight.fill_(3.0)
        model[0].weight.fill_(5.0)
    assert twin(torch.ones(1)).item() == 3
    assert model(torch.ones(1)).item() == 5


def test_forward_keeps_its_signature(scope: LayerScope) -> None:
    model = nn.Sequential(Probe(scope))
    plain = inspect.signature(model[0].forward)
    with scope.installed(model):
        assert inspect.signature(model[0].forward) == plain
        assert model[0].forward.__self__ is model[0]


def test_compiled_modules_run_suspended() -> None:
    calls = []

    @contextmanager
    def suspend() -> Iterator[None]:
        calls.append("off")
        yield
        calls.append("on")

    scope = LayerScope(suspend)
    model = nn.Sequential(nn.Linear(1, 1), Probe(scope))
    model[0].compile(backend="eager")
    assert is_compiled(model[0])
    assert not is_compiled(model[1])
    model[0]._compiled_call_impl = model[0]._call_impl  # as if compiled, without the compiler's seconds
    with scope.installed(model):
        model(torch.ones(1))
    assert calls == ["off", "on"]
    assert model[1].seen == ["1"]


def test_loss_modules_are_marked(scope: LayerScope) -> None:
    class DiceLoss(Probe):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            assert self.scope[0].stack[-1].is_loss
            return x

    model = nn.Sequential(DiceLoss(scope))
    with scope.installed(model):
        model(torch.ones(1))
        assert not scope.stack[-1].is_loss


def test_ordinals_count_within_one_call(scope: LayerScope) -> None:
    with scope.installed(nn.Identity()):
        assert [scope.stack[-1].next_place("mul", "input")[-1] for _ in range(3)] == [0, 1, 2]
        assert scope.stack[-1].next_place("mul", "other")[-1] == 0
    with scope.installed(nn.Identity()):
        assert scope.stack[-1].next_place("mul", "input")[-1] == 0
