"""Which operation is running: its name, its arguments, and what its backward tolerates."""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch.utils.checkpoint
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .declared import Declared

# What an operation saves is packed only where its backward is known to bear rounding: an operation that is in none of
# these sets keeps its tensors exact. sqrt, log, division and norms are absent on purpose: their backward divides by
# what they saved, so one element decoded near zero would destroy the gradient.
LINEAR = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc bilinear".split()
)
MATMUL = frozenset(
    "matmul mm bmm mv addmm addmv addbmm baddbmm addr outer einsum tensordot dot inner chain_matmul".split()
)
RELU = frozenset(["relu"])
ACTIVATIONS = frozenset(
    "gelu silu mish softplus tanh sigmoid elu selu celu hardswish log_sigmoid glu softsign tanhshrink".split()
)
NORMS = frozenset("batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm".split())
POOLS = frozenset(
    f"{kind}_pool{d}d{suffix}"
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
    for d in (1, 2, 3)
    for suffix in ("", "_with_indices")
)
PRODUCTS = frozenset("mul multiply addcmul lerp exp exp2 expm1 sin cos square erf sinc".split())
POWERS = frozenset(["pow", "float_power"])
DROPOUTS = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout native_dropout".split())
PACKABLE = (
    LINEAR | MATMUL | RELU | ACTIVATIONS | NORMS | POOLS | PRODUCTS | POWERS | DROPOUTS | frozenset(["checkpoint"])
)

ATTENTION = frozenset("scaled_dot_product_attention softmax softmin gumbel_softmax".split())
LOSS = frozenset(
    "cross_entropy log_softmax binary_cross_entropy binary_cross_entropy_with_logits kl_div nll_loss ctc_loss".split()
)
#: Fill their saved noise only after saving it: a copy taken when it is saved holds garbage (pytorch issue 193671).
FILLED_LATER = frozenset(["rrelu", "rrelu_with_noise"])
#: Reduce along one dimension and save positions in it.
POSITIONS = frozenset("max min topk sort argsort median nanmedian kthvalue mode cummax cummin amax amin".split())

_ARGUMENTS = {
    **dict.fromkeys(LINEAR, ("input", "weight", "bias")),
    "bilinear": ("input1", "input2", "weight", "bias"),
    **dict.fromkeys(("layer_norm", "rms_norm"), ("input", "normalized_shape", "weight", "bias")),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask"),
    "addmm": ("input", "mat1", "mat2"),
    "prelu": ("input", "weight"),
}
_DEFAULT_ARGUMENTS = ("input", "other")
# Python functions that hide other operations: the tracker stays on inside them.
_COMPOSITES = frozenset(["multi_head_attention_forward"])
# Frames between whoever calls an autograd function and the question who that is.
_BETWEEN = ("lightning_actmem", "torch.autograd.function")


class Observer(Protocol):
    """Who wants to know of operations before and after they run."""

    def before(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Return a note of the operation, or ``None`` when it is of no interest."""
        ...

    def after(self, note: Any, result: Any) -> None:
        """Take the result of an operation that was noted."""
        ...


class OperationTracker(TorchFunctionMode):
    """Notes the torch function that is running (0.8 us per operation).

    An `observer` is told of every operation that runs with gradient; ``replacements`` run instead of theirs, as
    ``replacement(function, arguments, keywords)``, and put into ``declared`` what they save, by its storage's identity.

    While an operation runs, `function` and `arguments` are its own; outside every operation `function` is ``None``.
    The arguments are not kept beyond the call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observer: Observer | None = None
        self.replacements: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.declared: dict[int, Declared] = {}
        self.note: Any = None
        self.function: Callable[..., Any] | None = None
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation with its name and arguments on record."""
        kwargs = kwargs or {}
        outer = self.function, self.arguments, self.keywords, self.note
        observer = self.observer if torch.is_grad_enabled() else None
        self.function, self.arguments, self.keywords = func, args, kwargs
        self.note = note = None if observer is None else observer.before(func, args, kwargs)
        try:
            if getattr(func, "__name__", None) in _COMPOSITES:
                with self:
                    return _without_override_check(func)(*args, **kwargs)
            replacement = self.replacements.get(func)
            result = func(*args, **kwargs) if replacement is None else replacement(func, args, kwargs)
            if observer is not None and note is not None:
                observer.after(note, result)
            return result
        finally:
            self.function, self.arguments, self.keywords, self.note = outer

    def tensor_arguments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of every tensor among the running operation's arguments."""
        names = _ARGUMENTS.get(self.name(), _DEFAULT_ARGUMENTS)
        for position, argument in enumerate(self.arguments):
            yield from _named_tensors(names[position] if position < len(names) else f"arg{position}", argument)
        for name, argument in self.keywords.items():
            yield from _named_tensors(name, argument)

    def name(self) -> str:
        """Return the running operation's plain name (``add_`` and ``__add__`` are ``add``), or ``""``."""
        return "" if self.function is None else plain_name(self.function)


def running_checkpoint() -> bool:
    """Whether the tensor that autograd is saving is an input that ``torch.utils.checkpoint`` saves."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__


def is_loss(operation: str) -> bool:
    """Whether the operation is a loss, or the log-softmax of one."""
    return operation in LOSS or operation.endswith("_loss")


def bears_rounding(operation: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the operation's gradient stays finite and close when what it saved is rounded."""
    if operation in POWERS:  # d(x^p) = p x^(p-1): below 1 it divides by x
        exponent = arguments[1] if len(arguments) > 1 else None
        return isinstance(exponent, (int, float)) and exponent >= 1
    return operation in PACKABLE


def index_bound(operation: str, source: Tensor) -> int | None:
    """Return a number that every index saved by the operation is below, from shapes alone.

    Args:
        operation: Plain name of the operation.
        source: The tensor that the operation indexes into.

    Returns:
        The exclusive upper bound, or ``None`` where the operation does not promise one.
    """
    if operation in POSITIONS:
        return max(source.shape, default=1)
    if operation in POOLS and "max" in operation:
        dimensions = int(operation.split("_pool")[1][0])
        return math.prod(source.shape[-dimensions:])
    return None


def _named_tensors(name: str, argument: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(argument, Tensor):
        yield name, argument
    elif isinstance(argument, (list, tuple)):
        for position, item in enumerate(argument):
            if isinstance(item, Tensor):
                yield f"{name}{position}", item


@functools.lru_cache(maxsize=4096)
def plain_name(function: Callable[..., Any]) -> str:
    """Return a torch function's name without marks (``add_``, ``__add__`` and ``__iadd__`` are ``add``).

    The name of a function that is not torch's own is ``""``.
    """
    if not _is_of_torch(function):
        return ""
    name: str = getattr(function, "__name__", type(function).__name__)
    if name.startswith("__"):
        name = name.strip("_")
        if name[1:] in PRODUCTS | MATMUL:
            name = name[1:]  # __imul__, __rmul__; __rpow__ is another function than pow
    name = name.rstrip("_").removeprefix("_")
    return "scaled_dot_product_attention" if name.startswith("scaled_dot_product") else name


def _is_of_torch(function: Callable[..., Any]) -> bool:
    """Whether a function is torch's own: somebody else's `gather` or `add` may do and save anything."""
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        packet = function.overloadpacket if isinstance(function, OpOverload) else function
        return str(packet._qualified_op_name).startswith("aten::")
    module = getattr(function, "__module__", None)
    if module is None:  # methods of Tensor that are written in C
        owner = getattr(function, "__objclass__", None)
        return owner is not None and str(owner.__module__).partition(".")[0] == "torch"
    return str(module).partition(".")[0] == "torch"


@functools.cache
def _without_override_check(function: types.FunctionType) -> Callable[..., Any]:
    """Return a copy of a `torch.nn.functional` function that does not look for torch-function modes itself.

    With the mode on, the original would hand itself to the mode again, without end.
    """
    quiet = {name: _no_override for name in vars(functional) if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **quiet},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _no_override(*_: Any) -> bool:
    return False
