"""What a saved tensor is, and so how it may be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_actmem_kernels import CodecSpec, integer_bits

from . import operation as ops
from .borrowed import Borrowed
from .operation import OperationTracker
from .scope import Frame

FLOATS = frozenset([torch.float32, torch.bfloat16, torch.float16])
_INDICES = frozenset([torch.int64, torch.int32])
MASK = CodecSpec("mask", bits=1)
TWO_VALUED = CodecSpec("two_valued", bits=1)

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
    """The codecs a configuration chooses for float activations.

    Args:
        general: For any activation; ``None`` keeps it exact.
        relu: For outputs of a ReLU, whose exact zeros are its derivative.
    """

    general: CodecSpec | None
    relu: CodecSpec | None

    @property
    def copies(self) -> bool:
        """Whether everything is copied losslessly: then nothing needs to stay exact by reference."""
        return self.general is not None and self.general.codec == "identity"


@dataclass(frozen=True)
class Verdict:
    """How one saved tensor is stored.

    Args:
        operation: Plain name of the operation that saves it.
        role: What it is to the operation.
        kind: ``"packed"``, or why it stays exact.
        spec: The codec, or ``None`` to keep the tensor by reference.
        versioned: Whether an in-place change before backward is an error, as in plain autograd.
    """

    operation: str
    role: str
    kind: str
    spec: CodecSpec | None = None
    versioned: bool = True


def identify(
    tensor: Tensor,
    storage_id: int,
    call: OperationTracker,
    frame: Frame,
    borrowed: Borrowed,
    codecs: Codecs,
    min_elements: int,
) -> Verdict:
    """Decide how a saved tensor is stored.

    Args:
        tensor: The tensor that autograd saves; a plain dense tensor.
        storage_id: Identity of its storage.
        call: The operation that is running.
        frame: The module call that is running.
        borrowed: Storages that somebody else keeps alive.
        codecs: The codecs for float activations.
        min_elements: Smaller tensors stay exact.

    Returns:
        The verdict.
    """
    operation = call.name() or ("checkpoint" if ops.running_checkpoint() else "custom")
    owner = borrowed.owner(storage_id)
    if owner is not None:
        return Verdict(operation, owner, owner)
    if is_weight(tensor):
        return Verdict(operation, "weight", "weight")
    role, source = _role(tensor, storage_id, call)
    if isinstance(source, nn.Parameter) or (operation in ops.LINEAR and role in ("weight", "operand")):
        return Verdict(operation, role, "weight")  # a cast of a frozen weight, or a weight computed from others
    if operation in ops.FILLED_LATER:
        return Verdict(operation, role, "unsupported", versioned=False)
    if codecs.copies:
        return Verdict(operation, role, "packed", codecs.general)
    if tensor.is_conj() or tensor.is_neg():
        return Verdict(operation, role, "unsupported")
    if tensor.numel() < min_elements:
        return Verdict(operation, role, "small")
    if tensor.dtype == torch.bool:
        return Verdict(operation, role, "packed", MASK)
    if tensor.dtype not in FLOATS:
        return Verdict(operation, role, *_index(tensor, operation, call, source))
    return Verdict(operation, role, *_float(tensor, operation, role, source, call, frame, borrowed, codecs))


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


def _float(
    tensor: Tensor,
    operation: str,
    role: str,
    source: Tensor | None,
    call: OperationTracker,
    frame: Frame,
    borrowed: Borrowed,
    codecs: Codecs,
) -> tuple[str, CodecSpec | None]:
    if frame.is_loss or ops.is_loss(operation):
        return "loss", None
    if operation in ops.DROPOUTS and source is None and not tensor.requires_grad:
        return "packed", TWO_VALUED
    if operation in ops.ATTENTION or operation.startswith("scaled_dot_product"):
        return "attention", None
    if not ops.bears_rounding(operation, call.arguments):
        return "exact", None
    arguments = [argument for _, argument in call.tensor_arguments()]
    if operation in ops.MATMUL and not any(is_weight(argument) or borrowed.owns(argument) for argument in arguments):
        return "attention", None  # a product of two activations: attention scores, or their sum over the values
    largest = max((argument.numel() for argument in arguments), default=0)
    if operation not in _PRODUCTS_WITH_WEIGHTS and tensor.numel() * _SMALL_FACTOR <= largest:
        return "statistic", None
    if not tensor.requires_grad:
        # Without grad and passed in: a constant, or features of frozen layers. Only what a linear operation multiplies
        # by its weight is worth rounding, and only when the step's inputs are known not to be it.
        if source is not None and not borrowed.knows_inputs:
            return "input", None
        if source is None or operation not in _PRODUCTS_WITH_WEIGHTS:
            return "constant", None
    elif tensor.is_leaf:
        return "input", None  # differentiated by the user, who holds it
    spec = codecs.relu if operation in ops.RELU else codecs.general
    return ("packed", spec) if spec is not None else ("exact", None)


def _storage_id(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # subclasses without storage of their own (DTensor, nested, sparse)
        return None
