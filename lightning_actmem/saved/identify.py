"""What a saved tensor is, and so how it may be stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_actmem_kernels import CodecSpec, integer_bits

from . import operation as ops
from .borrowed import Borrowed
from .declared import Declared
from .handle import DERIVED_BITS, EXACT_BITS
from .operation import OperationTracker
from .reduced import UNREAD, UNREAD_DEVICES, is_piecewise, one_bit
from .scope import Frame
from .window import Window, window_of

FLOATS = frozenset([torch.float32, torch.bfloat16, torch.float16])
_INDICES = frozenset([torch.int64, torch.int32])
MASK = CodecSpec("mask", bits=1)
TWO_VALUED = CodecSpec("two_valued", bits=1)
POSITIONS = CodecSpec("integer", bits=4)

# A tensor this many times smaller than the operation's largest argument is a statistic or a broadcast factor: its
# error would be multiplied over a whole row, and its bytes are few.
_SMALL_FACTOR = 8
_PRODUCTS_WITH_WEIGHTS = ops.LINEAR | ops.MATMUL
_VIEWS_AND_CASTS = frozenset(
    f"{name}Backward{number}"
    for name in (
        "T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Squeeze Expand Split SplitWithSizes Chunk Select "
        "Slice AsStrided Alias ToCopy Clone Narrow Unbind ViewAs Detach"
    ).split()
    for number in (0, 1, 2)
)


@dataclass(frozen=True)
class Codecs:
    """The codecs a configuration chooses for floats; ``None`` keeps them exact.

    Args:
        general: For any activation.
        relu: For outputs of a ReLU, whose exact zeros are its derivative.
        attention: For what attention multiplies: queries, keys, values, probabilities.
        loss: For what a loss saves.
        smallest: Whether to store of a tensor no more than its backward reads.
        signed: For the input of a batch norm that a ReLU follows, whose sign is stored too; ``None`` for no other code.
    """

    general: CodecSpec | None
    relu: CodecSpec | None
    attention: CodecSpec | None = None
    loss: CodecSpec | None = None
    smallest: bool = False
    signed: CodecSpec | None = None

    @property
    def copies(self) -> bool:
        """Whether everything is copied losslessly: then nothing needs to stay exact by reference."""
        return self.general is not None and self.general.codec == "identity"


class Verdict(NamedTuple):
    """How one saved tensor is stored.

    Args:
        operation: Plain name of the operation that saves it.
        role: What it is to the operation.
        kind: ``"packed"``, or why it stays exact.
        spec: The codec, or ``None`` to keep the tensor by reference.
        versioned: Whether an in-place change before backward is an error, as in plain autograd.
        derivable: Whether something computed from other tensors may take its place.
        least_bits: At how many bits anything that takes its place must have been stored; 32 asks for the tensor itself.
        is_output: Whether it is the operation's own output.
        levels: The two values that a stand-in takes, for a tensor of which backward reads one bit or nothing.
        bit: That bit, as a function of the tensor; with ``levels`` absent, the exact sign to keep beside a derivation.
        declared: What a replacement says of a tensor that it has made.
        signed: The codec for when a ReLU's sign, stored too, turns out to help (see `signed`).
        window: The max pool whose indices these are, if they fit in 4 bits; ``bit`` then gives the positions.
    """

    operation: str
    role: str
    kind: str
    spec: CodecSpec | None = None
    versioned: bool = True
    derivable: bool = False
    least_bits: int = EXACT_BITS
    is_output: bool = False
    levels: tuple[float, float] | None = None
    bit: Callable[[Tensor], Tensor] | None = None
    declared: Declared | None = None
    signed: CodecSpec | None = None
    window: Window | None = None


class Identifier:
    """Decides how saved tensors are stored.

    Args:
        call: Tells the running operation.
        codecs: The codecs for floats.
        min_elements: Smaller tensors stay exact.
        exact: Patterns of layers, or of operations after ``op:``, whose tensors stay exact.
    """

    def __init__(self, call: OperationTracker, codecs: Codecs, min_elements: int, exact: tuple[str, ...] = ()) -> None:
        self._exact = exact
        self._excluded: dict[tuple[str, str], bool] = {}
        self._call = call
        self._codecs = codecs
        self._min_elements = min_elements
        self.borrowed = Borrowed()

    def identify(self, tensor: Tensor, storage_id: int, frame: Frame) -> Verdict:
        """Decide how a saved tensor is stored.

        Args:
            tensor: The tensor that autograd saves; a plain dense tensor.
            storage_id: Identity of its storage.
            frame: The module call that is running.

        Returns:
            The verdict.
        """
        operation = self._call.name() or ("checkpoint" if ops.running_checkpoint() else "custom")
        owner = self.borrowed.owner(storage_id)
        if owner is not None:
            return Verdict(operation, owner, owner)
        if self._call.declared and (declared := self._call.declared.get(storage_id)) is not None:
            return self._declared(tensor, operation, declared)
        if is_weight(tensor):
            return Verdict(operation, "weight", "weight")
        role, source = _role(tensor, storage_id, self._call)
        if isinstance(source, nn.Parameter):
            return Verdict(operation, role, "weight")  # a cast of a frozen weight
        if operation in ops.LINEAR and role in ("weight", "operand"):
            return Verdict(operation, role, "exact")  # a weight computed from others
        if operation in ops.FILLED_LATER:
            return Verdict(operation, role, "unsupported", versioned=False)
        if self._codecs.copies:
            return Verdict(operation, role, "packed", self._codecs.general)
        if self._exact and self._is_excluded(frame.layer, operation):
            return Verdict(operation, role, "excluded")
        if tensor.numel() < self._min_elements:
            return Verdict(operation, role, "small")
        if tensor.dtype == torch.bool:
            return Verdict(operation, role, "packed", MASK)
        if tensor.dtype not in FLOATS:
            return self._index(tensor, operation, role, source)
        return self._float(tensor, operation, role, source, frame)

    def keeps(self, operation: str, frame: Frame) -> bool:
        """Whether what an operation saves stays as it is: it is part of a loss, or excluded by a pattern."""
        if frame.is_loss or ops.is_loss(operation):
            return True
        return bool(self._exact) and self._is_excluded(frame.layer, operation)

    def _declared(self, tensor: Tensor, operation: str, declared: Declared) -> Verdict:
        """Return the verdict on a tensor that a replacement saves."""
        spec = self._codecs.general
        found = Verdict(operation, declared.role, "packed", declared=declared if declared.own else None)
        if self._codecs.copies:
            return found._replace(spec=spec)
        if tensor.dtype == torch.bool:
            return found._replace(spec=MASK)
        if tensor.dtype not in FLOATS:
            return found._replace(kind="unsupported")
        if spec is None:
            return found._replace(kind="exact", derivable=not declared.own, least_bits=DERIVED_BITS)
        spec = _of_derivatives(spec, declared.bounds)
        return found._replace(spec=spec, derivable=not declared.own, least_bits=1)

    def _index(self, tensor: Tensor, operation: str, role: str, source: Tensor | None) -> Verdict:
        call = self._call
        if source is None and tensor.dtype in _INDICES:
            window = window_of(operation, call.arguments, call.keywords, tensor.device.type)
            if window is not None:
                return Verdict(operation, role, "packed", POSITIONS, window=window, bit=window.positions)
        return Verdict(operation, role, *_index(tensor, operation, call, source))

    def _float(self, tensor: Tensor, operation: str, role: str, source: Tensor | None, frame: Frame) -> Verdict:
        codecs = self._codecs
        if frame.is_loss or ops.is_loss(operation):
            unread = self._unread(tensor, operation, role)
            return unread or Verdict(operation, role, "loss", codecs.loss, least_bits=_bits(codecs.loss))
        if operation in ops.DROPOUTS and source is None and not tensor.requires_grad:
            return Verdict(operation, role, "packed", TWO_VALUED)
        if operation in ops.ATTENTION:
            return self._attention(operation, role)
        if (reduced := self._reduced(tensor, operation, role)) is not None:
            return reduced
        if is_piecewise(operation) or not ops.bears_rounding(operation, self._call.arguments):
            return Verdict(operation, role, "exact")
        return self._activation(tensor, operation, role, source)

    def _attention(self, operation: str, role: str) -> Verdict:
        """Return the verdict on an input of a fused kernel that is recomputed, or on the probabilities of a softmax."""
        spec = self._codecs.attention
        least_bits = min(_bits(spec), DERIVED_BITS)
        if operation != "scaled_dot_product_attention":
            return Verdict(operation, role, "attention", derivable=True, least_bits=least_bits, is_output=True)
        if not ops.running_checkpoint():  # not recomputed: what the kernel saved belongs together
            return Verdict(operation, role, "attention")
        return Verdict(operation, role, "attention", spec, derivable=True, least_bits=least_bits)

    def _reduced(self, tensor: Tensor, operation: str, role: str) -> Verdict | None:
        """Return the verdict on a tensor of which backward reads one bit per element, or nothing."""
        if (unread := self._unread(tensor, operation, role)) is not None:
            return unread
        if not self._codecs.smallest:
            return None
        found = one_bit(operation, self._call.arguments, self._call.keywords)
        return None if found is None else Verdict(operation, role, "packed", levels=found[0], bit=found[1])

    def _unread(self, tensor: Tensor, operation: str, role: str) -> Verdict | None:
        if not self._codecs.smallest or role not in UNREAD.get(operation, ()):
            return None
        if tensor.device.type not in UNREAD_DEVICES:
            return None
        return Verdict(operation, role, "unread", levels=(0.0, 0.0))

    def _activation(self, tensor: Tensor, operation: str, role: str, source: Tensor | None) -> Verdict:
        codecs = self._codecs
        arguments = [argument for _, argument in self._call.tensor_arguments()]
        if operation in ops.MATMUL and not any(map(self._is_weight, arguments)):
            # A product of two activations: attention scores, or their sum over the values.
            least_bits = min(_bits(codecs.attention), DERIVED_BITS)
            return Verdict(operation, role, "attention", codecs.attention, derivable=True, least_bits=least_bits)
        largest = max((argument.numel() for argument in arguments), default=0)
        if operation not in _PRODUCTS_WITH_WEIGHTS and tensor.numel() * _SMALL_FACTOR <= largest:
            return Verdict(operation, role, "statistic")
        if not tensor.requires_grad:
            # Without grad and passed in: a constant, or features of frozen layers. Only what a linear operation
            # multiplies by its weight is worth rounding, and only when the step's inputs are known not to be it.
            if source is not None and not self.borrowed.knows_inputs:
                return Verdict(operation, role, "input")
            if source is None or operation not in _PRODUCTS_WITH_WEIGHTS:
                return Verdict(operation, role, "constant")
        elif tensor.is_leaf:
            return Verdict(operation, role, "input")  # differentiated by the user, who holds it
        kind, least_bits = ("exact", DERIVED_BITS) if codecs.general is None else ("packed", 1)
        verdict = Verdict(operation, role, kind, codecs.general, derivable=True, least_bits=least_bits)
        if operation in ops.RELU:
            return verdict._replace(spec=codecs.relu, is_output=True, bit=_is_on)
        if operation == "batch_norm" and role == "input":
            return verdict._replace(signed=codecs.signed)
        return verdict._replace(is_output=role == "result")

    def _is_excluded(self, layer: str, operation: str) -> bool:
        known = self._excluded.get((layer, operation))
        if known is None:
            names = [layer, f"op:{operation}"]
            while "." in layer:
                layer = layer.rpartition(".")[0]
                names.append(layer)
            known = any(fnmatchcase(name, pattern) for name in names for pattern in self._exact)
            self._excluded[names[0], operation] = known
        return known

    def _is_weight(self, tensor: Tensor) -> bool:
        return is_weight(tensor) or self.borrowed.owns(tensor)


@lru_cache(maxsize=256)
def _of_derivatives(spec: CodecSpec, bounds: tuple[float, float] | None) -> CodecSpec:
    """Return the codec for derivatives that is as wide as the codec for any activation."""
    if bounds is not None:
        return CodecSpec("fixed", spec.bits, spec.group_size, spec.rounding, low=bounds[0], high=bounds[1])
    # Those of an activation lie around 1/2: without their mean a rotated group of gelu_new has half the error.
    return replace(spec, centre=True) if spec.codec == "rotated" else spec


def _bits(spec: CodecSpec | None) -> int:
    return EXACT_BITS if spec is None else spec.bits


def _is_on(output: Tensor) -> Tensor:
    return output != 0  # NaN passes gradient, as in plain autograd


def is_weight(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter, or leads back to one through views and casts alone."""
    if isinstance(tensor, nn.Parameter):
        return True
    node: Any = tensor.grad_fn
    while node is not None:
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":
            return isinstance(node.variable, nn.Parameter)
        if name not in _VIEWS_AND_CASTS:
            return False
        node = node.next_functions[0][0]
    return False


def _role(tensor: Tensor, storage_id: int, call: OperationTracker) -> tuple[str, Tensor | None]:
    """Name the argument that the tensor is, is a view of, or is an autocast copy of."""
    cast_from: list[tuple[str, Tensor]] = []
    for name, argument in call.tensor_arguments():
        if argument is tensor or _storage_id(argument) == storage_id:
            return name, argument
        if _may_be_cast(tensor, argument):
            cast_from.append((name, argument))
    if cast_from:
        return cast_from[0] if len(cast_from) == 1 else ("operand", None)
    return "result", None


def _may_be_cast(tensor: Tensor, argument: Tensor) -> bool:
    if argument.numel() != tensor.numel() or argument.dtype == tensor.dtype:
        return False
    if not (tensor.is_floating_point() and argument.is_floating_point()):
        return False
    if isinstance(argument, nn.Parameter) and argument.requires_grad:
        return False  # its cast leads back to it, see is_weight
    node: Any = tensor.grad_fn
    return node is None or node.name() in _VIEWS_AND_CASTS


def _index(
    tensor: Tensor, operation: str, call: OperationTracker, source: Tensor | None
) -> tuple[str, CodecSpec | None]:
    if tensor.dtype not in _INDICES:
        return "unsupported", None
    if source is not None:
        return "index", None  # an argument: the user's own
    first = next((argument for _, argument in call.tensor_arguments()), None)
    bound = None if first is None else ops.index_bound(operation, first)
    bits = None if bound is None else integer_bits(bound)
    if bits is None or bits >= tensor.element_size() * 8:
        return "index", None
    return "packed", CodecSpec("integer", bits=bits)


def _storage_id(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # subclasses without storage of their own (DTensor, nested, sparse)
        return None
