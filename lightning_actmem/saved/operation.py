"""What is known of torch's operations: their names, their arguments, and what their backward tolerates."""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.utils.checkpoint
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

# What an operation saves is packed only where its backward is known to bear rounding: an operation that is in none of
# these sets keeps its tensors exact. sqrt, log, division and norms are absent on purpose: their backward divides by
# what they saved, so one element decoded near zero would destroy the gradient.
LINEAR = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc bilinear".split()
)
MATMUL = frozenset(
    "matmul mm bmm mv addmm addmv addbmm baddbmm addr outer einsum tensordot dot inner chain_matmul".split()
)
#: May save contiguous copies of their arguments instead of these, with the elements in the order of their indices. What
#: einsum and tensordot copy they have permuted.
COPYING = frozenset("linear matmul mm bmm baddbmm addmm addbmm".split())
RELU = frozenset(["relu"])
ACTIVATIONS = frozenset(
    "gelu silu mish softplus tanh sigmoid elu selu celu hardswish log_sigmoid glu softsign tanhshrink".split()
)
NORMS = frozenset("batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm".split())
#: Differentiated by their result y alone: y (1 - y), 1 - y^2, y.
OWN_DERIVATIVE = frozenset("sigmoid tanh exp".split())
#: Norm the rows of the last dimension, or of some.
ROW_NORMS = frozenset("layer_norm rms_norm".split())
POOLS = frozenset(
    f"{kind}_pool{d}d{suffix}"
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
    for d in (1, 2, 3)
    for suffix in ("", "_with_indices")
)
PRODUCTS = frozenset("mul multiply addcmul lerp exp exp2 expm1 sin cos square erf sinc".split())
POWERS = frozenset(["pow", "float_power"])
#: Save nothing but their arguments and tensors that they have computed: without autocast never a copy or a cast.
ELEMENTWISE = RELU | ACTIVATIONS | PRODUCTS
#: Divide by what they have computed of their input: rounded apart from each other, the two cancel no more.
DIVIDING = frozenset("softsign local_response_norm".split())
#: Have a derivative of their own at every period: where a group's step is no longer small beside one, it is noise.
PERIODIC = frozenset("sin cos sinc".split())
DROPOUTS = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout native_dropout".split())
#: Give what they drop another value than zero, one that depends on their settings.
ALPHA_DROPOUTS = frozenset("alpha_dropout feature_alpha_dropout".split())
PACKABLE = (
    LINEAR | MATMUL | RELU | ACTIVATIONS | NORMS | POOLS | PRODUCTS | POWERS | DROPOUTS | frozenset(["checkpoint"])
) - (DIVIDING | PERIODIC)

ATTENTION = frozenset("scaled_dot_product_attention softmax softmin gumbel_softmax".split())
LOSS = frozenset(
    "cross_entropy log_softmax binary_cross_entropy binary_cross_entropy_with_logits kl_div nll_loss ctc_loss".split()
)
#: Of losses, those whose backward bears rounding: none of them divides by what it saved, or takes its logarithm.
BEARING_LOSSES = frozenset(
    "cross_entropy log_softmax nll_loss binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss huber_loss "
    "soft_margin_loss multilabel_soft_margin_loss".split()
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
_COMPOSITES = frozenset(["multi_head_attention_forward"])
# Questions to a tensor, which a model asks more often than it computes. Attributes are all of them questions or views.
_QUESTIONS = frozenset(
    "__get__ __len__ dim ndimension size stride numel nelement element_size storage_offset data_ptr is_contiguous "
    "is_floating_point is_complex get_device".split()
)
_INPLACE_OPERATORS = frozenset("__iadd__ __isub__ __imul__ __itruediv__ __ipow__".split())
# Frames between whoever calls an autograd function and the question who that is.
_BETWEEN = ("lightning_actmem", "torch.autograd.function")


@dataclass(frozen=True, slots=True)
class Operation:
    """What is known of a torch function, whatever it is called with.

    Args:
        name: Its name without marks (``add_``, ``__add__`` and ``__iadd__`` are ``add``), or ``""`` if it is not
            torch's own.
        argument_names: Names of its first positional arguments.
        saves_nothing: Whether autograd never saves a tensor in it.
        hides_others: Whether it is a Python function that hides other operations.
        in_place: Whether its name says that it changes its first argument.
    """

    name: str = ""
    argument_names: tuple[str, ...] = _DEFAULT_ARGUMENTS
    saves_nothing: bool = False
    hides_others: bool = False
    in_place: bool = False

    def changes_first_argument(self, keywords: dict[str, Any]) -> bool:
        """Whether the function works in place when it is called with these keywords."""
        return self.in_place or keywords.get("inplace") is True


@functools.lru_cache(maxsize=4096)
def operation_of(function: Callable[..., Any]) -> Operation:
    """Return what is known of a torch function."""
    name = plain_name(function)
    marked: str = getattr(function, "__name__", "")
    return Operation(
        name,
        _ARGUMENTS.get(name, _DEFAULT_ARGUMENTS),
        saves_nothing=marked in _QUESTIONS,
        hides_others=marked in _COMPOSITES,
        in_place=marked in _INPLACE_OPERATORS if marked.startswith("__") else marked.endswith("_"),
    )


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
    if operation in POWERS:  # d(x^p) = p x^(p-1): below 1 it divides by x, and a root of what is rounded below 0 is NaN
        exponent = arguments[1] if len(arguments) > 1 else None
        return isinstance(exponent, (int, float)) and exponent >= 1 and float(exponent).is_integer()
    return operation in PACKABLE


def bears_rounding_in_a_loss(operation: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an operation bears the codec of losses: a ReLU has one of its own, which keeps its zeros."""
    return operation in BEARING_LOSSES or (operation not in RELU and bears_rounding(operation, arguments))


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
