"""`plan`: what training will store and take at its peak, before it begins, from a few steps with small batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from ..config import LOSSLESS_BITS, ActMemConfig, ConfigLike, given_settings
from ..saved.ledger import BORROWED
from ..units import parse_bytes
from .callback import ActMem
from .memory_plan import LayerPlan, MemoryPlan, MethodPlan
from .repeated import checkpointing, matching, repeated_blocks
from .tracing import Traced, Tracer

PLAIN = "plain"
CHECKPOINT = "checkpoint"
_MAX_NAMES = 8
#: Settings by which bits adapt, because the rows of `plan` say themselves what holds, and where tensors are: that makes
#: no difference to what is stored, and the small batches may well run on the CPU.
_LEFT_OUT = frozenset(("adapt", "noise", "budget", "adapt_every", "method", "offload"))


def plan(
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    bits: int | Sequence[int] = (8, 4, 2),
    noise: float | None = 0.05,
    batch_size: int | None = None,
    budget: int | str | None = None,
    config: ConfigLike = None,
    checkpointed: Sequence[str] | None = None,
    trace: Sequence[int] = (32, 64),
    batch_arg_name: str = "batch_size",
    accelerator: str = "cpu",
) -> MemoryPlan:
    """Predict what training stores and takes at its peak: plain, packed, with bits by noise, and checkpointed.

    Runs two real training steps with each of two small batches and continues the straight line through them: for the
    peak one line for each moment of a step, the highest of which counts. Stored bytes are exact where tensors fill
    whole groups in the small batches too; the peak is the more accurate the larger the small batches are, because the
    temporaries of packing stop growing from some size of tensor on. For ``noise`` the bits are chosen as a run would
    choose them, but by measuring on the small batches, with the weights of now. A row that cannot be traced says why
    (`MemoryPlan.unpredicted`), and the others have their figures.

    Args:
        model: The module; its state is as before afterwards (`BatchTrials` says what of it).
        datamodule: The data, unless the model brings its own.
        bits: Widths, or the one, to compare with plain training.
        noise: Noise (as in `ActMemConfig`) for a row with bits that adapt; ``None``: no such row.
        batch_size: The batch to predict for; ``None``: the one that is set.
        budget: Memory to fill: bytes or a text such as ``"80GiB"`` or ``"1000000"``; ``None``: no largest batch
            is predicted.
        config: Other settings of `ActMemConfig`; those by which bits adapt and ``offload`` are left out.
        checkpointed: Patterns of submodules (``"blocks.*"``) for the row with ``torch.utils.checkpoint`` around each;
            ``None``: the model's repeated blocks, as `repeated_blocks` finds them; empty: no such row.
        trace: The two small batch sizes.
        batch_arg_name: Name of the batch size's attribute on model, its ``hparams`` or the datamodule.
        accelerator: Where to run the small batches.

    Returns:
        The plan.

    Raises:
        ValueError: If ``budget`` is no amount, ``trace`` is not two growing sizes, ``batch_size`` is not positive,
            ``noise`` is not above 0, ``config`` is not allowed, or nothing matches ``checkpointed``.
        ActMemError: If the batch size cannot be set, or even the small batches do not fit.
    """
    _check(trace, batch_size)
    budget_bytes = None if budget is None else parse_bytes(budget)
    cases = _cases(config, [bits] if isinstance(bits, int) else bits, noise)
    blocks = repeated_blocks(model) if checkpointed is None else matching(model, checkpointed) if checkpointed else None
    tracer = Tracer(model, datamodule, trace, batch_arg_name, accelerator)
    traced, unpredicted = _traced(tracer, cases, blocks or {})
    target = batch_size or traced[PLAIN].batch_size
    methods = tuple(_method(name, row, target, budget_bytes) for name, row in traced.items())
    layers = tuple(_layers(traced, target))
    return MemoryPlan(
        target, budget_bytes, (trace[0], trace[1]), methods, layers, tuple(_notes(traced, blocks)), unpredicted
    )


def _check(trace: Sequence[int], batch_size: int | None) -> None:
    if len(trace) != 2 or not 0 < trace[0] < trace[1]:
        raise ValueError(f"trace must be exactly two batch sizes, the smaller one first, got {list(trace)}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")


def _cases(config: ConfigLike, bits: Sequence[int], noise: float | None) -> dict[str, ActMem]:
    """Return what compresses in the rows by bits and by noise."""
    given = given_settings(config)
    ActMemConfig.load({name: value for name, value in given.items() if name in _LEFT_OUT})  # they may be wrong, too
    settings = {name: value for name, value in given.items() if name not in _LEFT_OUT} | {"summary": False}
    cases = {f"{width} bits": ActMem({**settings, "bits": width}) for width in bits}
    if noise is not None and settings.get("codec") != "identity":
        first = _first_bits(settings.get("bits"), bits)
        cases[f"noise={noise:g}"] = ActMem({**settings, "noise": noise, "bits": first})
    return cases


def _traced(
    tracer: Tracer, cases: Mapping[str, ActMem], blocks: Mapping[str, nn.Module]
) -> tuple[dict[str, Traced], dict[str, str]]:
    """Trace every way to train.

    Returns:
        What was traced, plain first, and why the others could not be, both by name.
    """
    traced = {PLAIN: tracer.trace(), **{name: tracer.trace(actmem) for name, actmem in cases.items()}}
    unpredicted = {name: f"no bits could be chosen: {row.reason}" for name, row in traced.items() if row.reason}
    if blocks:
        try:
            with checkpointing(blocks):
                traced[CHECKPOINT] = tracer.trace()
        except Exception as error:  # whatever blocks do that cannot run twice: the other rows have their figures
            unpredicted[CHECKPOINT] = _reason(error)
    return {name: row for name, row in traced.items() if name not in unpredicted}, unpredicted


def _reason(error: Exception) -> str:
    """Return an error's name and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _first_bits(given: int | None, bits: Sequence[int]) -> int:
    """Return the bits that a row with bits that adapt begins with: the given ones, or about the default."""
    default = ActMemConfig().bits
    lossy = [width for width in bits if width != LOSSLESS_BITS]
    return (
        given
        if given not in (None, LOSSLESS_BITS)
        else min(lossy, key=lambda width: abs(width - default), default=default)
    )


def _method(name: str, traced: Traced, batch_size: int, budget_bytes: int | None) -> MethodPlan:
    envelope = traced.envelope
    line = envelope.at(batch_size)
    stored = raw = None
    if traced.reports:
        first, second = traced.reports
        stored = traced.at(batch_size, first.saved_bytes, second.saved_bytes)
        raw = traced.at(batch_size, first.raw_bytes, second.raw_bytes)
    return MethodPlan(
        name,
        round(line.fixed_bytes),
        line.bytes_per_sample,
        stored,
        raw,
        line.peak_bytes(batch_size),
        None if budget_bytes is None else envelope.largest(budget_bytes),
        tuple((round(each.fixed_bytes), each.bytes_per_sample) for each in envelope.lines),
    )


def _layers(traced: Mapping[str, Traced], batch_size: int) -> list[LayerPlan]:
    layers: dict[tuple[str, str], LayerPlan] = {}
    for name, found in traced.items():
        sums: dict[tuple[str, str], list[list[int]]] = {}
        for index, report in enumerate(found.reports):
            for row in report.rows:
                if row.kind not in BORROWED:
                    counts = sums.setdefault((row.layer, row.kind), [[0, 0], [0, 0]])[index]
                    counts[0] += row.raw_bytes
                    counts[1] += row.saved_bytes
        for key, ((raw_first, saved_first), (raw_second, saved_second)) in sums.items():
            layer = layers.setdefault(key, LayerPlan(*key, found.at(batch_size, raw_first, raw_second), {}))
            layer.saved_bytes[name] = found.at(batch_size, saved_first, saved_second)
    return list(layers.values())


def _notes(traced: Mapping[str, Traced], blocks: Mapping[str, nn.Module] | None) -> Iterator[str]:
    for name, row in traced.items():
        if row.noise is not None:
            yield _noise_note(name, row)
    if blocks is not None:
        yield _checkpoint_note(blocks)


def _noise_note(name: str, traced: Traced) -> str:
    bits = traced.reports[1].bits_per_element
    return (
        f"{name}: {bits:.2f} bits per element of an activation, noise {traced.noise:.3g} as measured, with the weights "
        "of now; the bits of a run follow its own measurements"
    )


def _checkpoint_note(blocks: Mapping[str, nn.Module]) -> str:
    if not blocks:
        return (
            f"{CHECKPOINT}: none found; no class of blocks is repeated in a ModuleList or Sequential. Name what to "
            "checkpoint by patterns"
        )
    names, more = list(blocks)[:_MAX_NAMES], len(blocks) - _MAX_NAMES
    classes = ", ".join(dict.fromkeys(type(block).__name__ for block in blocks.values()))
    return f"{CHECKPOINT}: around each of {len(blocks)} x {classes} ({', '.join(names)}{', ...' if more > 0 else ''})"
