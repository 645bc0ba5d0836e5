"""What a saved tensor is, and so how it may be stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_actmem_kernels import CodecSpec, integer_bits

from . import operation as ops
from .borrowed import Borrowed
from .declared import Declared
from .fitted import of_derivatives, within_rows
from .ledger import BORROWED
from .patterns import Patterns
from .payload import DERIVED_BITS, EXACT_BITS
from .reduced import UNREAD, UNREAD_DEVICES, is_piecewise, one_bit
from .role import role_of, view_role
from .scope import Frame
from .tracker import Call
from .weights import is_parameter, is_weight
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
_FILLED = frozenset("MaskedFillBackward0 MaskedFillBackward1 WhereBackward0".split())
# What scaled_dot_product_attention multiplies.
_MULTIPLIED = frozenset("query key value".split())
# Whose activations have one verdict in one place, whatever else the operation is called with.
_ORDINARY = ops.LINEAR | ops.ELEMENTWISE | ops.NORMS


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
        within_rows: Whether groups of a norm's input end where its rows do; where codecs follow from what is measured,
            that has to tell.
    """

    general: CodecSpec | None
    relu: CodecSpec | None
    attention: CodecSpec | None = None
    loss: CodecSpec | None = None
    smallest: bool = False
    signed: CodecSpec | None = None
    within_rows: bool = False

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
        pinned: Whether the codec is the user's own for this place, which no plan changes.
        waits: Whether it is encoded only when nothing that divides has followed for a while (see `own_derivative`).
        is_final: Whether nothing may take its place, so that the first tensor of a storage goes to the store at once.
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
    pinned: bool = False
    waits: bool = False
    is_final: bool = False


@lru_cache(maxsize=4096)
def _by_reference(operation: str, role: str, kind: str) -> Verdict:
    return Verdict(operation, role, kind, is_final=kind not in BORROWED)


class Identifier:
    """Decides how saved tensors are stored.

    Args:
        codecs: The codecs for floats.
        min_elements: Smaller tensors stay exact.
        exact: Patterns of what stays exact.
        others: Codecs of what has its own, by pattern.
        declared: What replacements say of the tensors that they save, by their storages' identities.
    """

    def __init__(
        self,
        codecs: Codecs,
        min_elements: int,
        exact: tuple[str, ...] = (),
        others: Mapping[str, Codecs] = MappingProxyType({}),
        declared: Mapping[int, Declared] = MappingProxyType({}),
    ) -> None:
        self._exact = Patterns(dict.fromkeys(exact, True))
        self._others = Patterns(others)
        self._small: dict[tuple[str, str, str], Verdict] = {}
        self._ordinary: dict[tuple[str, str, str], Verdict] = {}
        self._codecs = codecs
        self._copies = codecs.copies
        self._declared = declared
        self.min_elements = min_elements
        self.borrowed = Borrowed()

    def name_classes(self, classes: Mapping[str, str]) -> None:
        """Take the names of the layers' classes, by path: patterns may speak of them."""
        self._small.clear()
        self._ordinary.clear()
        self._exact.name_classes(classes)
        self._others.name_classes(classes)

    def identify(self, tensor: Tensor, storage_id: int, call: Call, frame: Frame) -> Verdict:
        """Decide how a saved tensor is stored.

        Args:
            tensor: The tensor that autograd saves; a plain dense tensor.
            storage_id: Identity of its storage.
            call: The torch function that is running.
            frame: The module call that is running.

        Returns:
            The verdict.
        """
        operation = call.operation.name or ("checkpoint" if ops.running_checkpoint() else "custom")
        owner = self.borrowed.owner(storage_id)
        if owner is not None:
            return _by_reference(operation, owner, owner)
        if forward_ad._current_level >= 0:  # perhaps a tangent: nothing tells it from the tensor that it goes with
            return _by_reference(operation, "operand", "weight" if is_weight(tensor) else "unsupported")
        if self._declared and (declared := self._declared.get(storage_id)) is not None:
            found = self._of_declared(tensor, operation, declared, frame.layer)
            return found._replace(pinned=True) if self._others.find(frame.layer, operation) else found
        role, source, may_be_cast = role_of(tensor, storage_id, call)
        # Where it is clear that the operation itself has computed the tensor, its history is not asked: 0.2 us.
        if (role != "result" or may_be_cast or operation not in ops.ELEMENTWISE) and is_weight(tensor):
            return _by_reference(operation, "weight", "weight")
        if source is not None and is_parameter(source):
            return _by_reference(operation, role, "weight")  # a cast of a frozen weight
        place = operation, role, frame.layer
        if tensor.numel() < self.min_elements or self._copies:
            return self._small.get(place) or self._of_small(operation, role, frame.layer)
        known = self._ordinary.get(place)
        if known is not None and tensor.dtype in FLOATS and tensor.requires_grad and not tensor.is_leaf:
            if operation in ops.PRODUCTS and _is_filled(tensor):
                return Verdict(operation, role, "exact")
            return self._statistic(tensor, operation, role, call) or known
        verdict = self._of_place(operation, role, frame.layer)
        if verdict is not None:
            return verdict
        if tensor.dtype == torch.bool:
            return Verdict(operation, role, "packed", MASK)
        if tensor.dtype not in FLOATS:
            return self._index(tensor, operation, role, source, call)
        verdict = self._float(tensor, operation, role, source, call, frame)
        if self._others.find(frame.layer, operation):
            verdict = verdict._replace(pinned=True)
        if verdict.derivable and tensor.requires_grad and operation in _ORDINARY:
            self._ordinary[place] = verdict
        return verdict

    def _of_small(self, operation: str, role: str, layer: str) -> Verdict:
        """Return the verdict on a small tensor, or a copied one, which depends on nothing else, and remember it."""
        verdict = self._of_place(operation, role, layer) or _by_reference(operation, role, "small")
        self._small[operation, role, layer] = verdict
        return verdict

    def _of_place(self, operation: str, role: str, layer: str) -> Verdict | None:
        """Return the verdict on tensors of any type and size, where they have one in common."""
        if operation in ops.LINEAR and role in ("weight", "operand"):
            return _by_reference(operation, role, "exact")  # a weight computed from others
        if operation in ops.FILLED_LATER:
            return Verdict(operation, role, "unsupported", versioned=False)
        if self._copies:
            return Verdict(operation, role, "packed", self._codecs.general, is_final=True)
        if self._exact.find(layer, operation):
            return _by_reference(operation, role, "excluded")
        return None

    def keeps(self, operation: str, frame: Frame) -> bool:
        """Whether what an operation saves stays as it is: it is part of a loss, or excluded by a pattern."""
        if frame.is_loss or ops.is_loss(operation):
            return True
        return bool(self._exact.find(frame.layer, operation))

    def _of_declared(self, tensor: Tensor, operation: str, declared: Declared, layer: str) -> Verdict:
        """Return the verdict on a tensor that a replacement saves."""
        spec = self._codecs_of(operation, layer).general
        found = Verdict(operation, declared.role, "packed", declared=declared if declared.own else None)
        if self._copies:
            return found._replace(spec=spec)
        if tensor.dtype == torch.bool:
            return found._replace(spec=MASK)
        if tensor.dtype not in FLOATS:
            return found._replace(kind="unsupported")
        if spec is None:
            return found._replace(kind="exact", derivable=not declared.own, least_bits=DERIVED_BITS)
        spec = of_derivatives(spec, declared.bounds)
        return found._replace(spec=spec, derivable=not declared.own, least_bits=1)

    def _codecs_of(self, operation: str, layer: str) -> Codecs:
        return self._others.find(layer, operation) or self._codecs

    def _index(self, tensor: Tensor, operation: str, role: str, source: Tensor | None, call: Call) -> Verdict:
        if source is None and tensor.dtype in _INDICES:
            window = window_of(operation, call.arguments, call.keywords, tensor.device.type)
            if window is not None:
                return Verdict(operation, role, "packed", POSITIONS, window=window, bit=window.positions)
        return Verdict(operation, role, *_index(tensor, call, source))

    def _float(
        self, tensor: Tensor, operation: str, role: str, source: Tensor | None, call: Call, frame: Frame
    ) -> Verdict:
        codecs = self._codecs_of(operation, frame.layer)
        if frame.is_loss or ops.is_loss(operation):
            unread = self._unread(tensor, operation, role)
            spec = codecs.loss if ops.bears_rounding_in_a_loss(operation, call.arguments) else None
            return unread or Verdict(operation, role, "loss", spec, least_bits=_bits(spec))
        dropout = operation in ops.DROPOUTS or operation in ops.ALPHA_DROPOUTS
        if dropout and source is None and not tensor.requires_grad:
            return Verdict(operation, role, "packed", TWO_VALUED)
        if operation in ops.ATTENTION:
            return self._attention(operation, view_role(tensor, role, call), codecs)
        if (reduced := self._reduced(tensor, operation, role, call)) is not None:
            return reduced
        if is_piecewise(operation) or not ops.bears_rounding(operation, call.arguments):
            return Verdict(operation, role, "exact")
        return self._activation(tensor, operation, role, source, call, codecs)

    def _attention(self, operation: str, role: str, codecs: Codecs) -> Verdict:
        """Return the verdict on an input of a fused kernel that is recomputed, or on the probabilities of a softmax."""
        spec = codecs.attention
        least_bits = min(_bits(spec), DERIVED_BITS)
        if operation != "scaled_dot_product_attention":
            return Verdict(operation, role, "attention", derivable=True, least_bits=least_bits, is_output=True)
        if not ops.running_checkpoint():  # not recomputed: what the kernel saved belongs together
            return Verdict(operation, role, "attention")
        if role not in _MULTIPLIED:  # a mask of floats: beside its -inf or -1e9 a group's other values would be noise
            return Verdict(operation, role, "attention", derivable=True, least_bits=DERIVED_BITS)
        return Verdict(operation, role, "attention", spec, derivable=True, least_bits=least_bits)

    def _reduced(self, tensor: Tensor, operation: str, role: str, call: Call) -> Verdict | None:
        """Return the verdict on a tensor of which backward reads one bit per element, or nothing."""
        if (unread := self._unread(tensor, operation, role)) is not None:
            return unread
        if not self._codecs.smallest:
            return None
        found = one_bit(operation, call.arguments, call.keywords)
        return None if found is None else Verdict(operation, role, "packed", levels=found[0], bit=found[1])

    def _unread(self, tensor: Tensor, operation: str, role: str) -> Verdict | None:
        if not self._codecs.smallest or role not in UNREAD.get(operation, ()):
            return None
        if tensor.device.type not in UNREAD_DEVICES:
            return None
        return Verdict(operation, role, "unread", levels=(0.0, 0.0))

    def _activation(
        self, tensor: Tensor, operation: str, role: str, source: Tensor | None, call: Call, codecs: Codecs
    ) -> Verdict:
        if operation in ops.MATMUL and not any(map(self._is_weight, call.tensors())):
            # A product of two activations: attention scores, or their sum over the values.
            least_bits = min(_bits(codecs.attention), DERIVED_BITS)
            return Verdict(operation, role, "attention", codecs.attention, derivable=True, least_bits=least_bits)
        if (statistic := self._statistic(tensor, operation, role, call)) is not None:
            return statistic
        if operation in ops.PRODUCTS and _is_filled(tensor):
            return Verdict(operation, role, "exact")
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
        if codecs is not self._codecs:  # asked for: what is stored in fewer bits elsewhere will not do
            least_bits = min(_bits(codecs.general), DERIVED_BITS)
        verdict = Verdict(operation, role, kind, codecs.general, derivable=True, least_bits=least_bits)
        if operation in ops.RELU:
            return verdict._replace(spec=codecs.relu, is_output=True, bit=_is_on)
        if operation == "batch_norm" and role == "input":
            return verdict._replace(signed=codecs.signed)
        if operation in ops.ROW_NORMS and role == "input" and codecs.within_rows and codecs.general is not None:
            return verdict._replace(spec=within_rows(codecs.general, tensor.shape[-1]))
        is_output = role == "result"
        return verdict._replace(is_output=is_output, waits=is_output and operation in ops.OWN_DERIVATIVE)

    @staticmethod
    def _statistic(tensor: Tensor, operation: str, role: str, call: Call) -> Verdict | None:
        """Return the verdict on a statistic or a broadcast factor."""
        if operation in _PRODUCTS_WITH_WEIGHTS:
            return None
        smallest = tensor.numel() * _SMALL_FACTOR
        for argument in call.tensors():
            if argument.numel() >= smallest:
                return _by_reference(operation, role, "statistic")
        return None

    def _is_weight(self, tensor: Tensor) -> bool:
        return is_weight(tensor) or self.borrowed.owns(tensor)


def _bits(spec: CodecSpec | None) -> int:
    return EXACT_BITS if spec is None else spec.bits


def _is_filled(tensor: Tensor) -> bool:
    """Whether somebody has put a number in place of some elements, most probably -1e9: a group's others would be noise.

    Scores that are masked and then multiplied by a learned temperature.
    """
    return tensor.grad_fn is not None and tensor.grad_fn.name() in _FILLED


def _is_on(output: Tensor) -> Tensor:
    return output != 0  # NaN passes gradient, as in plain autograd


def _index(tensor: Tensor, call: Call, source: Tensor | None) -> tuple[str, CodecSpec | None]:
    if tensor.dtype not in _INDICES:
        return "unsupported", None
    if source is not None:
        return "index", None  # an argument: the user's own
    first = next((argument for _, argument in call.named_tensors()), None)
    bound = None if first is None else ops.index_bound(call.operation.name, first)
    bits = None if bound is None else integer_bits(bound)
    if bits is None or bits >= tensor.element_size() * 8:
        return "index", None
    return "packed", CodecSpec("integer", bits=bits)
