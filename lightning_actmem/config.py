"""The one configuration object: Python argument, OmegaConf schema and LightningCLI argument."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_actmem_kernels import CodecSpec
from lightning_actmem_kernels.spec import WIDTHS

from .units import parse_bytes

LOSSLESS_BITS = 32
BITS = (1, 2, 3, 4, 8, LOSSLESS_BITS)
CODECS = ("auto", "measured", "uniform", "rotated", "bfp", "fp8_e4m3", "fp8_e5m2", "identity")
_NARROW_CODECS = ("bfp", "fp8_e4m3", "fp8_e5m2")
ROUNDINGS = ("dither", "stochastic", "nearest")
ACTIVATIONS = ("derive", "derivative", "inverted")
BACKENDS = ("auto", "triton", "torch")
METHODS = ("actmem", "actnn", "gact")

ConfigLike = Union["ActMemConfig", DictConfig, Mapping[str, Any], str, "os.PathLike[str]", None]


@dataclass(frozen=True, kw_only=True)
class ActMemConfig:
    """What to store for the backward pass, and how.

    Args:
        bits: Bits per stored activation element: 1, 2, 3, 4 or 8; 32 is lossless, bit-equal to plain training: floats
            stay as they are, masks and indices shrink.
        codec: ``"auto"`` (rotated at 1 and 2 bits, min-max groups from 3), ``"measured"`` (for each site the one with
            the least error on its own first tensor), ``"uniform"`` (min-max groups), ``"rotated"`` (random rotation
            within groups, at 1 to 4 bits), ``"bfp"`` (block floating point, at 2, 3, 4 and 8 bits), ``"fp8_e4m3"`` and
            ``"fp8_e5m2"`` (scaled float8, at 8 bits) or ``"identity"`` (a lossless copy: exercises the whole packing
            path, saves nothing; for debugging). Outputs of a ReLU always get a code that keeps zeros exact.
        group_size: Consecutive elements that share one minimum and step: a power of two from 32 to 1024.
        rounding: ``"dither"`` (subtractive dither: unbiased, half the variance of stochastic rounding; float8 has no
            dither and takes stochastic rounding instead), ``"stochastic"`` or ``"nearest"`` (biased; for comparison).
        seed: Seed of the rounding noise, from 0 to 2**31 - 1. The noise never touches a random generator of yours.
        backend: ``"auto"`` (Triton on a GPU where it is installed, else PyTorch), ``"triton"`` or ``"torch"``.
        derive: Compute again, instead of storing, what follows from a stored tensor by a cheap operation, and store of
            the rest no more than backward reads. ``None``: yes, unless the configuration is lossless.
        activations: What element-wise operations keep: ``"derive"`` (their input, or what it follows from),
            ``"derivative"`` (their derivative, one tensor for a whole chain of them) or ``"inverted"`` (GELU and SiLU:
            their output and one bit).
        attention_bits: Least bits for what attention multiplies (queries, keys, values); 32 keeps it exact. Where bits
            adapt, values may get fewer.
        loss_bits: Least bits for what a loss saves; 32 keeps it exact.
        layer_bits: Bits of layers that have their own, by the patterns of ``exact``; the last that matches wins, and 32
            keeps floats exact.
        layer_activations: What element-wise operations keep where that differs from ``activations``, likewise by
            pattern: ``{"type:MLP": "derivative", "op:silu": "inverted"}``.
        exact: What stays exact: patterns of layer paths (``"encoder.0"`` and everything below it, ``"*.head"``), of
            classes (``"type:LayerNorm"``, likewise), or of operations (``"op:gelu"``).
        min_elements: Tensors with fewer elements than this stay as they are.
        adapt: Whether the bits of every site follow from what its rounding does to the gradient. ``None``: if
            ``noise``, ``budget`` or another ``method`` than ``"actmem"`` is given. With neither ``noise`` nor
            ``budget``, ``bits`` is the average over what is stored.
        noise: Variance that rounding may add to the gradient, relative to the variance that the minibatch gradient has
            by itself (0.05: 5 %); with the fewest bytes. Given with ``budget``, the bytes keep the budget first.
        budget: Activation bytes to store at most: ``"4GiB"``, ``"800MB"``, ``"1000000"``; with the least variance.
        adapt_every: Training batches between two adaptations; 0: once an epoch.
        method: ``"actmem"`` (measured), or for comparison ``"actnn"`` or ``"gact"``, as these were published.
        offload: Whether packed tensors move to pinned host memory and come back in backward, on a CUDA device: false,
            true (all of them, but for what would have to come back at once), or the bytes that stay on the device
            (``"2GiB"``): what is beyond them moves, the oldest first. ``budget`` limits what is stored in all.
        summary: Print the per-layer table after the first training step, where Lightning prints its model summary.
        verbose: Print at every adaptation what changes and why, and the table again.

    Raises:
        ValueError: If a value is not one of those above.
        TypeError: If a value has the wrong type.

    Example:
        >>> ActMemConfig(bits=2).bits
        2
    """

    bits: int = 4
    codec: str = "auto"
    group_size: int = 256
    rounding: str = "dither"
    seed: int = 0
    backend: str = "auto"
    derive: Optional[bool] = None  # noqa: UP045 (OmegaConf and jsonargparse read it at run time)
    activations: str = "derive"
    attention_bits: int = 8
    loss_bits: int = 32
    layer_bits: dict[str, int] = field(default_factory=dict, hash=False)
    layer_activations: dict[str, str] = field(default_factory=dict, hash=False)
    exact: tuple[str, ...] = ()
    min_elements: int = 1024
    adapt: Optional[bool] = None  # noqa: UP045
    noise: Optional[float] = None  # noqa: UP045
    budget: Optional[str] = None  # noqa: UP045
    adapt_every: int = 0
    method: str = "actmem"
    offload: Union[bool, int, str] = False  # noqa: UP007 (OmegaConf and jsonargparse read it at run time)
    summary: bool = True
    verbose: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("bits", "attention_bits", "loss_bits", "group_size", "seed", "min_elements"):
            _check_int(name, getattr(self, name))
        for name in ("bits", "attention_bits", "loss_bits"):
            _check_choice(name, getattr(self, name), BITS, "Use 32 for lossless storage.")
        _check_choice("codec", self.codec, CODECS)
        _check_codec_bits(self.codec, self.bits)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        if self.codec == "measured" and self.rounding == "nearest":
            raise ValueError(
                "rounding must be 'dither' or 'stochastic' with codec 'measured', which compares unbiased codecs, got "
                "'nearest'. Choose one of these, or name a codec."
            )
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("activations", self.activations, ACTIVATIONS)
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to 2**31 - 1, got {self.seed}. Choose another number.")
        if self.min_elements < 0:
            raise ValueError(f"min_elements must be 0 or more, got {self.min_elements}. Use 0 to pack everything.")
        for name in ("summary", "verbose"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if not (self.derive is None or isinstance(self.derive, bool)):
            raise TypeError(f"derive must be true, false or null, got {self.derive!r}.")
        exact: Any = self.exact  # a list from YAML, or what a user mistook for one
        if not isinstance(exact, (list, tuple)) or not all(isinstance(pattern, str) for pattern in exact):
            raise TypeError(f"exact must be a list of patterns such as ['encoder.0', 'op:gelu'], got {self.exact!r}.")
        object.__setattr__(self, "exact", tuple(exact))
        self._check_layer_bits()
        self._check_layer_activations()
        CodecSpec("uniform", bits=4, group_size=self.group_size)  # the kernels own the rule for group sizes
        self._check_adaptation()
        self._check_offload()

    def _check_offload(self) -> None:
        if not isinstance(self.offload, (bool, int, str)):
            raise TypeError(f"offload must be true, false or an amount such as '2GiB', got {self.offload!r}.")
        try:
            parse_bytes(1 if isinstance(self.offload, bool) else self.offload)
        except ValueError as error:
            raise ValueError(
                f"offload must be true, false or the bytes that stay on the device, got {self.offload!r}: {error} "
                "Use true to move whatever can be moved."
            ) from error

    def _check_adaptation(self) -> None:
        _check_int("adapt_every", self.adapt_every)
        _check_choice("method", self.method, METHODS)
        if self.adapt_every < 0:
            raise ValueError(f"adapt_every must be 0 or more, got {self.adapt_every}. Use 0 for once an epoch.")
        if not (self.adapt is None or isinstance(self.adapt, bool)):
            raise TypeError(f"adapt must be true, false or null, got {self.adapt!r}.")
        noise: Any = self.noise
        if noise is not None and (not isinstance(noise, (int, float)) or isinstance(noise, bool)):
            raise TypeError(f"noise must be a number such as 0.05, got {noise!r}.")
        if noise is not None and not 0 < noise < math.inf:
            raise ValueError(f"noise must be above 0 and finite, got {noise}. Use bits=32 for no noise at all.")
        if not (self.budget is None or isinstance(self.budget, str)):
            raise TypeError(f"budget must be a text such as '4GiB', got {self.budget!r}.")
        if self.budget is not None:
            parse_bytes(self.budget)
        if self.adapt is False and (self.noise is not None or self.budget is not None):
            raise ValueError("noise and budget need adaptation, got adapt=False. Leave adapt out.")
        if self.adapts and self.lossless:
            raise ValueError(
                f"adaptation needs a codec that rounds, got bits={self.bits}, codec={self.codec!r}. Choose the bits to "
                "begin with, from 1 to 8."
            )

    @property
    def adapts(self) -> bool:
        """Whether codec and bits of every site follow from what is measured."""
        given = self.noise is not None or self.budget is not None or self.method != METHODS[0]
        return given if self.adapt is None else self.adapt

    @property
    def budget_bytes(self) -> int | None:
        """``budget`` as a number of bytes."""
        return None if self.budget is None else parse_bytes(self.budget)

    @property
    def offload_bytes(self) -> int | None:
        """Stored bytes that ``offload`` leaves on the device: 0 for all that can be moved, ``None`` for no offload."""
        if isinstance(self.offload, bool):
            return 0 if self.offload else None
        return parse_bytes(self.offload)

    def _check_layer_bits(self) -> None:
        given: Any = self.layer_bits
        if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
            raise TypeError(f"layer_bits must map patterns to bits, such as {{'encoder.0': 8}}, got {given!r}.")
        for pattern, bits in given.items():
            _check_int(f"layer_bits[{pattern!r}]", bits)
            _check_choice(f"layer_bits[{pattern!r}]", bits, BITS, "Use 32 for lossless storage.")
            _check_codec_bits(self.codec, bits)
        if given and self.lossless:
            raise ValueError(
                f"layer_bits need a codec that rounds, got bits={self.bits}, codec={self.codec!r}. Set bits=8 or less, "
                "and layer_bits={'*': 32, ...} for what stays lossless."
            )
        object.__setattr__(self, "layer_bits", dict(given))

    def _check_layer_activations(self) -> None:
        given: Any = self.layer_activations
        if not isinstance(given, Mapping) or not all(isinstance(pattern, str) for pattern in given):
            raise TypeError(
                f"layer_activations must map patterns to one of {', '.join(map(repr, ACTIVATIONS))}, such as "
                f"{{'encoder.0': 'derivative'}}, got {given!r}."
            )
        for pattern, activations in given.items():
            _check_choice(f"layer_activations[{pattern!r}]", activations, ACTIVATIONS)
        object.__setattr__(self, "layer_activations", dict(given))

    @property
    def lossless(self) -> bool:
        """Whether nothing is rounded: gradients are bit-equal to plain training unless ``activations`` are set."""
        return self.bits == LOSSLESS_BITS or self.codec == "identity"

    @classmethod
    def load(cls, source: ConfigLike = None, *, dotlist: Sequence[str] = (), **fields: Any) -> ActMemConfig:
        """Build a configuration from a file, a mapping, overrides, or all of them; later ones win.

        Args:
            source: A configuration, a mapping, an OmegaConf node, or the path of a YAML file.
            dotlist: Overrides such as ``["bits=2", "group_size=128"]``.
            **fields: Overrides by name.

        Returns:
            The checked configuration.

        Raises:
            FileNotFoundError: If ``source`` is a path that does not exist.
            TypeError: If ``source`` is of another kind, or a value has the wrong type.
            ValueError: If a key is unknown or a value is not allowed.

        Example:
            >>> ActMemConfig.load({"bits": 8}, dotlist=["bits=2"]).bits
            2
        """
        if isinstance(source, ActMemConfig) and not dotlist and not fields:
            return source
        merged: dict[str, Any] = {**_as_mapping(source), **_as_mapping(_from_dotlist(dotlist)), **fields}
        _check_keys(merged)
        try:
            # OmegaConf converts what YAML and the command line give ("2" -> 2) and names what it cannot convert.
            schema = OmegaConf.structured(cls)
            OmegaConf.set_readonly(schema, False)  # it takes the flag from the frozen dataclass
            values = OmegaConf.to_container(OmegaConf.merge(schema, merged), resolve=True)
        except OmegaConfBaseException as error:
            raise TypeError(f"{error.full_key or 'value'}: {error.msg or error}. Expected: {_schema()}.") from error
        return cls(**{str(key): value for key, value in dict(values).items()})  # type: ignore[arg-type]


def given_settings(source: ConfigLike = None, **fields: Any) -> dict[str, Any]:
    """Return only the settings that somebody has given, unchecked: what may override somebody else's.

    Args:
        source: As for `ActMemConfig.load`; a whole `ActMemConfig` gives every setting.
        **fields: Settings by name; ``None`` means "not given".

    Returns:
        The settings by name.

    Example:
        >>> given_settings({"bits": 8}, bits=None, seed=1)
        {'bits': 8, 'seed': 1}
    """
    return {**_as_mapping(source), **{name: value for name, value in fields.items() if value is not None}}


def _as_mapping(source: ConfigLike) -> Mapping[str, Any]:
    if source is None:
        return {}
    if isinstance(source, ActMemConfig):
        return dataclasses.asdict(source)
    values: Any = source
    if isinstance(values, (str, os.PathLike)):
        if not os.path.isfile(values):
            raise FileNotFoundError(f"config must be the path of a YAML file, got {os.fspath(values)!r}: no such file.")
        values = OmegaConf.load(os.fspath(values))
    if OmegaConf.is_config(values):
        values = OmegaConf.to_container(values, resolve=True)
    if not isinstance(values, Mapping):
        raise TypeError(
            "config must be an ActMemConfig, a mapping, an OmegaConf node or the path of a YAML file, "
            f"got {type(values).__name__}."
        )
    return values


def _from_dotlist(dotlist: Sequence[str]) -> DictConfig:
    for item in dotlist:
        if "=" not in item:
            raise ValueError(f"dotlist items must look like 'bits=2', got {item!r}.")
    return OmegaConf.from_dotlist(list(dotlist))


def _check_keys(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(ActMemConfig)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
            raise ValueError(f"unknown ActMem setting {key!r}. {hint}")


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")


def _check_choice(name: str, value: object, allowed: Sequence[object], remedy: str = "Choose one of these.") -> None:
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}. {remedy}")


def _check_codec_bits(codec: str, bits: int) -> None:
    allowed = (*WIDTHS[codec], LOSSLESS_BITS) if codec in _NARROW_CODECS else BITS
    if bits not in allowed:
        choices = ", ".join(map(str, allowed))
        raise ValueError(f"bits must be one of {choices} with codec {codec!r}, got {bits}. Or use codec='auto'.")


def _schema() -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in dataclasses.fields(ActMemConfig))
