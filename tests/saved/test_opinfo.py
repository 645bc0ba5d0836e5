"""Every operation and module that torch tests itself with: gradients under lossless packing are bit-equal.

With derivation on they are equal within the rounding of what is computed again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_actmem import ActMemEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

SAMPLES = 4  # per operation: the first ones; torch orders them from plain to exotic


def differentiable(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from differentiable(item)
    elif isinstance(value, dict):
        yield from differentiable(list(value.values()))


def gradients(run: Callable[[], Any], leaves: list[Tensor], engine: ActMemEngine | None) -> list[Tensor | None]:
    """Return the gradients of the sum of all outputs (absolute values of complex ones)."""
    torch.manual_seed(7)
    if engine is None:
        outputs = list(differentiable(run()))
    else:
        with engine.compress():
            outputs = list(differentiable(run()))
    outputs = [out.abs() if out.is_complex() else out for out in outputs if out.layout is torch.strided]
    if not outputs:
        return []
    total = torch.stack([out.sum().double() for out in outputs]).sum()
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.to_dense().nan_to_num(7), b.to_dense().nan_to_num(7))


def close(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal but for the rounding of what is computed again."""
    if a is None or b is None:
        return a is b
    return torch.allclose(a.to_dense(), b.to_dense(), rtol=1e-4, atol=1e-5, equal_nan=True)


def check(run: Callable[[], Any], leaves: list[Tensor], label: str) -> bool:
    """Compare plain and packed gradients; return whether there was something to compare."""
    try:
        plain, again = (gradients(run, leaves, None) for _ in range(2))
    except RuntimeError:  # a sample that torch itself cannot differentiate here
        return False
    if not all(map(same, plain, again)):
        return False  # not repeatable without hooks either
    for config in ({"codec": "identity"}, {"bits": 32}, {"bits": 32, "derive": True}):
        packed = gradients(run, leaves, ActMemEngine(min_elements=0, **config))
        assert len(packed) == len(plain), label
        alike = close if config.get("derive") else same
        assert all(map(alike, plain, packed)), f"{label} with {config}"
    return bool(plain)


OPERATIONS = [op for op in op_db if op.supports_autograd and torch.float32 in op.dtypes]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns about its own samples: beta features, deprecated overloads
@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: f"{op.name}-{op.variant_test_name}")
def test_operation(op: Any) -> None:
    compared = 0
    for sample in islice(op.sample_inputs("cpu", torch.float32, requires_grad=True), SAMPLES):
        arguments = (sample.input, *sample.args)
        leaves = [leaf for leaf in differentiable([*arguments, sample.kwargs]) if leaf.is_leaf]
        if leaves:
            compared += check(lambda: op(*arguments, **sample.kwargs), leaves, op.name)  # noqa: B023 (called at once)
    if not compared:
        pytest.skip("no sample of it has a repeatable gradient here")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_module(info: Any) -> None:
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=True)
    compared = 0
    for sample in islice(samples, SAMPLES):
        made, called = sample.constructor_input, sample.forward_input
        if called is None:
            continue
        torch.manual_seed(3)
        module = info.module_cls(*made.args, **made.kwargs)
        leaves = [*module.parameters(), *differentiable([called.args, called.kwargs])]
        if leaves:
            compared += check(lambda: module(*called.args, **called.kwargs), leaves, info.name)  # noqa: B023
    if not compared:
        pytest.skip("no sample of it has a repeatable gradient here")
