"""Every element-wise function that can be replaced, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_actmem import ActMemEngine
from lightning_actmem.methods.rules import _NAMES, RULES, Curve

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, 2.0, 5.0),
    "elu": F.elu,
    "elu alpha": lambda x: F.elu(x, alpha=1.7),
    "elu small alpha": lambda x: F.elu(x, 0.3),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
    "tanh": torch.tanh,
    "tanh method": lambda x: x.tanh(),
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "square": torch.square,
    "square by mul": lambda x: x * x,
    "cube": lambda x: x**3,
    "pow 1": lambda x: torch.pow(x, 1.0),
    "pow 1.5": lambda x: torch.pow(torch.exp(x), 1.5),
    "pow 2.0": lambda x: torch.pow(x, 2.0),
}
LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda z, x: z + x,
    "radd": lambda z, x: 3 + z,
    "add alpha": lambda z, x: torch.add(z, x, alpha=0.3),
    "sub": lambda z, x: z - x,
    "sub alpha": lambda z, x: x.sub(z, alpha=2),
    "sub a number": lambda z, x: z - 1.5,
    "rsub": lambda z, x: 1.5 - z,
    "rsub of tensors": lambda z, x: torch.rsub(z, x),
    "neg": lambda z, x: -z,
    "mul": lambda z, x: z * x,
    "rmul": lambda z, x: 0.3 * z,
    "square of a chain": lambda z, x: z * z,
    "square of a square": lambda z, x: (x * x).square() * z,
    "div": lambda z, x: z / 3,
    "torch.div": lambda z, x: torch.div(z, 3.0),
}
SHAPES = [(3000,), (7, 11, 13, 3), (1, 1200)]


def plain_and_derivative(
    compute: Callable[..., Tensor], *inputs: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], ActMemEngine]:
    """Return gradients of plain autograd and of derivatives kept exactly."""
    results, outputs = [], []
    engine = ActMemEngine(bits=32, activations="derivative")
    for packed in (False, True):
        tensors = [x * 1 for x in inputs]
        if packed:
            with engine.compress():
                out = compute(*tensors)
        else:
            out = compute(*tensors)
        outputs.append(out)
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        results.append(torch.autograd.grad((out * weight).sum(), inputs))
    assert torch.equal(*outputs)
    assert outputs[0].stride() == outputs[1].stride()
    return results[0], results[1], engine


def assert_same(plain: tuple[Tensor, ...], packed: tuple[Tensor, ...]) -> None:
    for expected, found in zip(plain, packed, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CURVES)
def test_every_function(name: str, memory_format: torch.memory_format) -> None:
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64) * 2
        if len(shape) == 4:
            x = x.to(memory_format=memory_format)
        plain, packed, engine = plain_and_derivative(CURVES[name], x.requires_grad_())
        assert_same(plain, packed)
        assert {site.role for site in engine.ledger.sites} == {"derivative"}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations_and_products_go_on_from_a_chain(name: str) -> None:
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        plain, packed, engine = plain_and_derivative(lambda x: LINEAR[name](torch.tanh(x), x), x)
        assert_same(plain, packed)
        engine.ledger.settle()
        assert {site.role for site in engine.ledger.sites} == {"derivative"}


@pytest.mark.parametrize("name", CURVES)
def test_a_second_tensor_with_gaps_in_memory(name: str) -> None:
    x = torch.randn(64, 96, dtype=torch.float64, requires_grad=True)
    plain, packed, _ = plain_and_derivative(lambda x: CURVES[name](x[:, 16:80]), x)
    assert_same(plain, packed)


def test_bounds_hold_and_are_tight() -> None:
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.linspace(-1e4, 1e4, 1001)]).double()
    for name, function in CURVES.items():
        form = _form_of(function, x)
        if isinstance(form, Curve) and form.bounds is not None:
            derivative = form.chain(torch.ones((), dtype=x.dtype).expand_as(x), x, function(x))
            low, high = form.bounds
            assert low <= float(derivative.min()) <= low + 2e-3, name
            assert high - 2e-3 <= float(derivative.max()) <= high, name


class _Listener(TorchFunctionMode):
    """Notes the rule of the last function that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.form: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RULES:
            self.form = RULES[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _form_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with _Listener() as listener:
        function(x)
    return listener.form


def test_every_spelling_reaches_its_rule() -> None:
    """Operators and methods come to a torch-function mode as other functions in other versions of PyTorch."""
    x = torch.randn(8)
    for compute in (lambda x: x * 2, lambda x: 2 * x, lambda x: x + 1, lambda x: 1 - x, lambda x: x / 2, lambda x: -x):
        assert _form_of(compute, x) is not None
    for module in (torch.nn.GELU(), torch.nn.SiLU(), torch.nn.Mish(), torch.nn.Softplus(), torch.nn.Tanh()):
        assert isinstance(_form_of(module, x), Curve)
    assert set(RULES.values()) == set(_NAMES)


def test_arguments_that_a_rule_does_not_take() -> None:
    x = torch.randn(2048, requires_grad=True)
    engine = ActMemEngine(bits=32, activations="derivative")
    with engine.compress():
        z = x * 1
        out = [F.silu(z + 0, True), torch.pow(z.abs(), 0.5), torch.pow(2.0, z), torch.div(z, 2, rounding_mode="floor")]
        out += [z * torch.tensor(2.0), z + torch.ones(1), z / z.detach(), z.double() * 2, torch.mul(z, z.detach()[:1])]
        out += [F.celu(z, -0.5)]  # its derivative has no bound
    assert not any(site.role == "derivative" for site in engine.ledger.sites)
    assert all(o.requires_grad for o in out)
    with pytest.raises(TypeError, match="unexpected keyword argument 'approx'"), engine.compress():
        F.silu(x, approx=True)  # type: ignore[call-arg]
