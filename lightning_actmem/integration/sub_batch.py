"""Parts of a training batch: disjoint, of equal size, cut along the dimension that counts samples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from lightning_utilities.core.apply_func import apply_to_collection, is_dataclass_instance, is_namedtuple
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

_PLAIN = (str, bytes, bool, int, float, complex)


class Cut(NamedTuple):
    """What came of cutting a batch.

    Args:
        parts: The sub-batches, with tensors of their own: a step may change its batch in place. Empty if it cannot be
            cut.
        samples: Samples in each of them.
        reason: Why it cannot be cut, else empty.
        total: Samples in the batch.
    """

    parts: tuple[Any, ...]
    samples: int = 0
    reason: str = ""
    total: int = 0


def cut(batch: Any, *, count: int, share: int, least: int = 1) -> Cut:
    """Cut the first samples of a batch into sub-batches.

    Samples are counted by the size that all tensors share in their first dimension (of size 1: shared by all samples),
    by sequences of plain values, and by graphs in a batch of graphs; tensors without dimensions go with every part.
    Where tensors share no size, a tuple of equally long sequences is taken for columns, as ``tuple(zip(*samples))``
    gives it.

    Args:
        batch: Tensors in any nesting of mappings, sequences, named tuples and dataclasses.
        count: How many sub-batches, without a sample in common.
        share: Each one holds this fraction (``1 / share``) of the samples at most.
        least: More than that, where it is less than this number of samples and the batch has enough.

    Returns:
        The parts, or the reason why there are none.
    """
    sizes = {size for size in _sizes(batch) if size != 1}
    columns = _columns(batch) if len(sizes) != 1 else 0
    if columns:
        sizes = {columns}
    if not sizes:
        return Cut((), reason="it has no tensor with more than one sample")
    if len(sizes) > 1:
        listed = ", ".join(map(str, sorted(sizes)))
        return Cut((), reason=f"its tensors have different sizes in their first dimension ({listed})")
    (total,) = sizes
    samples = min(max(total // share, least), total // count)
    if samples < 1:
        return Cut((), reason=f"it has {total} samples, fewer than the {count} parts that are wanted")
    rows = [slice(start, start + samples) for start in range(0, count * samples, samples)]
    try:
        if columns:
            taken = tuple(tuple(column[part] for column in batch) for part in rows)
            return Cut(apply_to_collection(taken, Tensor, _own), samples, total=total)
        return Cut(tuple(_take(batch, part, total) for part in rows), samples, total=total)
    except Exception as error:  # of whatever class the batch is: training has to go on
        return Cut((), reason=f"a part of a {type(batch).__name__} could not be built ({error})")


def _sizes(batch: Any) -> Iterator[int]:
    """Yield how many samples each piece of a batch counts."""
    if isinstance(batch, PackedSequence):
        yield int(batch.batch_sizes[0])  # they lie on the CPU always
    elif _is_graphs(batch):
        yield int(batch.num_graphs)
    elif isinstance(batch, Tensor):
        if batch.ndim:
            yield len(batch)
    else:
        for part in _children(batch):
            yield from _sizes(part)


def _children(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        yield from batch.values()
    elif is_dataclass_instance(batch):
        yield from (getattr(batch, field.name) for field in dataclasses.fields(batch))
    elif isinstance(batch, (list, tuple)):
        yield from batch


def _columns(batch: Any) -> int:
    """Return the common length of a tuple's sequences, each of values of one kind, or 0."""
    if type(batch) is not tuple or not all(isinstance(column, (list, tuple)) for column in batch):
        return 0
    lengths = {len(column) for column in batch}
    alike = all(len({type(value) for value in column}) == 1 for column in batch)
    return lengths.pop() if alike and len(lengths) == 1 and min(lengths) > 1 else 0


def _take(batch: Any, rows: slice, total: int) -> Any:
    """Return some samples of a batch of ``total``."""
    if isinstance(batch, PackedSequence):
        return _take_packed(batch, rows)
    if _is_graphs(batch):
        return type(batch).from_data_list(batch.to_data_list()[rows])
    if isinstance(batch, Tensor):
        return _own(batch[rows] if batch.ndim and len(batch) == total else batch)
    if isinstance(batch, Mapping):
        return _take_mapping(batch, rows, total)
    if is_dataclass_instance(batch):
        part = copy.copy(batch)
        for field in dataclasses.fields(batch):
            # Past the class's own setter: it may be frozen.
            object.__setattr__(part, field.name, _take(getattr(batch, field.name), rows, total))
        return part
    if isinstance(batch, (list, tuple)):
        return _take_sequence(batch, rows, total)
    return batch


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _take_mapping(batch: Mapping[Any, Any], rows: slice, total: int) -> Any:
    taken = {key: _take(value, rows, total) for key, value in batch.items()}
    if not isinstance(batch, MutableMapping):
        return type(batch)(taken)  # type: ignore[call-arg]
    part = copy.copy(batch)  # keeps what its class holds beside the items
    for key, value in taken.items():
        part[key] = value
    return part


def _take_sequence(batch: Sequence[Any], rows: slice, total: int) -> Any:
    if len(batch) == total and all(isinstance(value, _PLAIN) for value in batch):
        return batch[rows]
    taken = [_take(value, rows, total) for value in batch]
    return type(batch)(*taken) if is_namedtuple(batch) else type(batch)(taken)  # type: ignore[call-arg]


def _take_packed(batch: PackedSequence, rows: slice) -> PackedSequence:
    padded, lengths = pad_packed_sequence(batch, batch_first=True)
    return pack_padded_sequence(padded[rows], lengths[rows], batch_first=True, enforce_sorted=False)


def _is_graphs(batch: Any) -> bool:
    """Whether this is a batch of graphs as in PyTorch Geometric."""
    return all(hasattr(batch, name) for name in ("num_graphs", "to_data_list")) and hasattr(
        type(batch), "from_data_list"
    )
