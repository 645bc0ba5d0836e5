"""Which tensors need not be stored because they follow from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, UntypedStorage

from . import operation as ops
from .batch_norm import batch_norm_recipe, given_to_batch_norm
from .borrowed import Borrowed
from .derived import Derived
from .geometry import Geometry, is_plain
from .handle import Handle
from .payload import DecodeCache
from .recipe import Autocast, Recipe, Slot, Source, with_slots
from .reduced import ONE_BIT
from .share import SharedStorages, StoredStorage
from .tracker import Call
from .weights import is_weight

# Deterministic, and cheap enough to run twice: element-wise, row-wise, or a copy. Roots and logarithms are absent: an
# argument that was rounded below zero would give them NaN.
_ELEMENTWISE = ops.ACTIVATIONS | ops.PRODUCTS | ops.POWERS | ops.RELU | ONE_BIT | frozenset("add sub neg div".split())
_ROWS = frozenset("layer_norm group_norm rms_norm softmax masked_fill where".split())
_COPIES = frozenset("to float half bfloat16 type_as contiguous clone reshape flatten cat stack".split())
_MATRIX_PRODUCTS = frozenset("matmul bmm baddbmm".split())
REPLAYED = _ELEMENTWISE | _ROWS | _COPIES | _MATRIX_PRODUCTS
FROM_SAVED = frozenset(["batch_norm"]) | ops.DROPOUTS - {"native_dropout"}  # which returns its mask too
#: Save their own output: its recipe is needed while the operation still runs.
SAVES_OUTPUT = frozenset("relu tanh sigmoid softmax exp".split())

_MAX_DEPTH = 8
# An argument this many times smaller than the result is stored by value when it is not stored already.
_SMALL_FACTOR = 32
# A mask that all heads, and mostly all layers, have in common.
_MASK_FACTOR = 2
_MASKED = frozenset("add masked_fill where".split())


class Outcome(NamedTuple):
    """A storage's contents as the result of a recipe.

    Args:
        recipe: The recipe.
        inputs: What goes into its slots: an argument to be found, or a handle.
        size: Shape of the result.
        stride: Its strides.
        dtype: Its type.
    """

    recipe: Recipe
    inputs: tuple[Source | Handle, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Deriver:
    """Notes how tensors come about during one step, and derives those that follow from what is stored.

    Args:
        shared: What is stored.
        cache: Remembers the last computed segments.
        copy: Stores a small tensor by value and books its bytes.
        min_elements: Smaller tensors are not derived, as they are not packed.
    """

    operations = REPLAYED | FROM_SAVED

    def __init__(
        self, shared: SharedStorages, cache: DecodeCache, copy: Callable[[Tensor], Handle], min_elements: int
    ) -> None:
        self._shared = shared
        self._cache = cache
        self._copy = copy
        self._min_elements = min_elements
        self._borrowed = Borrowed()

    def start_step(self, borrowed: Borrowed) -> None:
        """Begin a step with these storages of the model and the batch."""
        self._borrowed = borrowed

    def after(self, call: Call, result: Any) -> None:
        """Note the result of an operation: how the contents of its storage came about."""
        if not isinstance(result, Tensor) or result.numel() < self._min_elements:
            return
        if not result.requires_grad or not is_plain(result):
            return
        storage, version = result.untyped_storage(), result._version
        known = self._shared.noted.get(storage._cdata)
        if isinstance(known, StoredStorage) and version in known.outcomes:
            return  # where it was saved already
        if storage.nbytes() != result.nbytes or self._is_argument(call, storage, version):
            return  # a recipe is for a whole storage
        entry = self._shared[storage]
        if (found := self._recipe(call, result)) is not None:
            recipe, inputs = found
            outcome = Outcome(recipe, inputs, tuple(result.shape), result.stride(), result.dtype)
            entry.add_outcome(version, outcome)

    def note_copy(self, call: Call, tensor: Tensor, handle: Handle) -> None:
        """Note that a product has saved a contiguous copy of one of its arguments instead of the argument."""
        copied = _copied_argument(call, tensor)
        if copied is not None:
            argument, geometry = copied
            self._shared[argument.untyped_storage()].add_copy(geometry, handle)

    def note_original(self, call: Call, tensor: Tensor, entry: StoredStorage) -> None:
        """Note what a contiguous copy is of that a product saves: so it may follow from what is stored of that."""
        copied = None if tensor._version in entry.outcomes else _copied_argument(call, tensor)
        autocast = Autocast.now(tensor.device.type)
        if copied is None or autocast is None or tensor.untyped_storage().nbytes() != tensor.nbytes:
            return
        argument, geometry = copied
        source = Source(self._shared[argument.untyped_storage()], geometry, None)
        shape = tuple(tensor.shape)
        recipe = Recipe(_contiguous, (Slot(0), shape), {}, autocast, steps=0)
        entry.add_outcome(tensor._version, Outcome(recipe, (source,), shape, tensor.stride(), tensor.dtype))

    def derive(self, entry: StoredStorage, version: int, least_bits: int, attention: bool) -> Derived | None:
        """Make a storage's contents derivable, if they follow from what is stored.

        Args:
            entry: The storage.
            version: Version of its contents.
            least_bits: Quality that everything they follow from must have at least.
            attention: Whether products of activations may be run again.

        Returns:
            What stands for the payload; it is known to ``entry`` as long as somebody holds it. ``None`` if the
            contents do not follow.
        """
        outcome = entry.outcomes.get(version)
        if outcome is None or (outcome.recipe.product and not attention):
            return None
        handles: list[Handle] = []
        for wanted in outcome.inputs:
            handle = self._handle(wanted, least_bits, attention) if isinstance(wanted, Source) else wanted
            if handle is None or handle.bits < least_bits:
                return None
            handles.append(handle)
        derived = Derived(outcome.recipe, tuple(handles), outcome.size, outcome.stride, outcome.dtype, self._cache)
        if derived.depth > _MAX_DEPTH:
            return None
        entry.add_derived(version, outcome.dtype, derived)
        return derived

    def _handle(self, wanted: Source, least_bits: int, attention: bool) -> Handle | None:
        small = None if wanted.small is None else wanted.small()
        if small is not None and small._version == wanted.geometry.version:
            # By value: what autograd itself does not save may well be changed before backward, or be a weight that
            # FSDP has resharded by then.
            return self._copy(small)
        handle = wanted.storage.find_values(wanted.geometry, least_bits)
        if handle is not None:
            return handle
        derived = self.derive(wanted.storage, wanted.geometry.version, least_bits, attention)
        return None if derived is None else wanted.storage.find(wanted.geometry, least_bits)

    def _recipe(self, call: Call, result: Tensor) -> tuple[Recipe, tuple[Source | Handle, ...]] | None:
        inputs = self._inputs(call, result)
        autocast = Autocast.now(result.device.type)
        if inputs is None or autocast is None:
            return None
        if call.operation.name in ops.DROPOUTS:
            return _dropout_recipe(call, inputs, autocast)
        if call.operation.name == "batch_norm" and given_to_batch_norm(call).get("training"):
            return batch_norm_recipe(call, inputs, autocast)
        product = call.operation.name in _MATRIX_PRODUCTS
        if product and any(is_weight(tensor) or self._borrowed.owns(tensor) for tensor, _ in call.inputs()):
            return None  # a layer's own product is not cheap
        if call.operation.name == "div" and any(value.small is None for value in inputs[1:]):
            return None  # rounded, a divisor may be zero
        if call.operation.name in ops.POWERS and not ops.bears_rounding(call.operation.name, call.arguments):
            return None
        arguments, keywords = with_slots((call.arguments, call.keywords))
        return Recipe(call.function, arguments, keywords, autocast, call.in_place, product), inputs

    def _inputs(self, call: Call, result: Tensor) -> tuple[Source, ...] | None:
        inputs: list[Source] = []
        for tensor, geometry in call.inputs():
            if geometry is None or tensor.device != result.device:
                return None
            is_mask = call.operation.name in _MASKED and not tensor.requires_grad
            small = tensor.numel() * (_MASK_FACTOR if is_mask else _SMALL_FACTOR) <= result.numel()
            source = self._shared[tensor.untyped_storage()]
            inputs.append(Source(source, geometry, ref(tensor) if small else None))
        return tuple(inputs)

    @staticmethod
    def _is_argument(call: Call, storage: UntypedStorage, version: int) -> bool:
        """Whether a result is a view of an argument that the operation has not changed."""
        return any(
            geometry is not None and geometry.version == version and tensor.untyped_storage()._cdata == storage._cdata
            for tensor, geometry in call.inputs()
        )


def _copied_argument(call: Call, tensor: Tensor) -> tuple[Tensor, Geometry] | None:
    """Return the argument of a product that a contiguous tensor is a copy of, and its geometry."""
    if not tensor.is_contiguous():
        return None
    is_layer = call.operation.name == "linear"  # flattens its input, and never copies its weight
    inputs = call.inputs()
    if is_layer:
        x = call.arguments[0] if call.arguments else call.keywords.get("input")
        inputs = [(argument, geometry) for argument, geometry in inputs if argument is x]
    if not is_layer and len({argument.shape[:-2] for argument, _ in inputs}) > 1:
        return None  # a broadcast argument: the copy is of an expansion
    ending = -1 if is_layer else -2
    matches = [
        (argument, geometry)
        for argument, geometry in inputs
        if geometry is not None
        and (argument.numel(), argument.dtype) == (tensor.numel(), tensor.dtype)
        and argument.shape[ending:] == tensor.shape[ending:]
    ]
    return matches[0] if len(matches) == 1 else None


def _contiguous(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.contiguous().view(shape)


_Built = tuple[Recipe, tuple[Source | Handle, ...]]


def _dropout_recipe(call: Call, inputs: tuple[Source, ...], autocast: Autocast) -> _Built | None:
    if call.saved is None or len(call.saved) != 1:
        return None
    mask, handle = call.saved[0]
    keep = 1.0
    if mask.dtype == torch.bool:  # the fused kernels save a bool mask and scale by themselves
        p = call.arguments[1] if len(call.arguments) > 1 else call.keywords.get("p", 0.5)
        keep = 1.0 - float(p)
    return Recipe(_masked, (Slot(0), Slot(1), keep), {}, autocast), (inputs[0], handle)


def _masked(x: Tensor, mask: Tensor, keep: float) -> Tensor:
    return x * mask if keep == 1.0 else x * mask / keep
