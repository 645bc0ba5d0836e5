"""Segments that are kept as they are in a probe, and rounded in the backward passes that ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec, Layout, decode, encode

from .ledger import Charge, Ledger
from .payload import EXACT_BITS, AnyPayload, DecodeCache, Payload
from .site import Site, mix64

if TYPE_CHECKING:
    from .identify import Verdict
    from .signed import Sign

_COMPACT_BITS = 8
_EXACT = CodecSpec("identity")


@dataclass
class SiteUse:
    """What a site has stored in one step, as far as it rounds.

    Args:
        default: Codec that it gets without a plan.
        kind: As in the ledger: ``"packed"``, ``"attention"`` or ``"loss"``.
        dtype: Type of the elements.
        numels: Elements of each tensor.
        pinned: Whether the codec is the user's own for this place: it adds its noise, but there is no choice.
    """

    default: CodecSpec
    kind: str
    dtype: torch.dtype
    numels: list[int] = field(default_factory=list)
    pinned: bool = False

    def stored_bytes(self, spec: CodecSpec | None) -> int:
        """Return the bytes that the site's tensors take by this codec (``None``: as they are)."""
        if spec is None:
            return sum(self.numels) * self.dtype.itemsize
        return sum(spec.stored_bytes(numel, self.dtype) for numel in self.numels)


class Watch(Protocol):
    """Who wants to know of every tensor that is rounded."""

    def put(
        self, tensor: Tensor, layout: Layout, site: Site, verdict: Verdict, spec: CodecSpec | None
    ) -> AnyPayload | None:
        """Return what is stored in place of the encoded tensor, or ``None`` to leave it to the store.

        Args:
            tensor: The tensor.
            layout: Its layout.
            site: Where it comes from.
            verdict: What it is; ``verdict.spec`` is its codec without a plan.
            spec: Its codec by the plan; ``None`` keeps it exact.
        """
        ...


class Rounding:
    """What backward rounds in a probe; changed between the passes.

    Args:
        noise: 64-bit mix of seed, rank and step.
        ledger: Books the copies.
        cache: The decoded segments of the probe: forgotten with every change.
        backend: Kernel backend, or ``None`` for the fastest.
        compact: Whether to keep segments at 8 bits instead of exactly: the point at which rounding is measured moves by
            a 300th of what 2 bits move it, and a probe takes a quarter of the memory.
    """

    def __init__(self, noise: int, ledger: Ledger, cache: DecodeCache, backend: str | None, compact: bool) -> None:
        self.uses: dict[Site, SiteUse] = {}
        self.payloads: list[ReferenceType[ProbePayload]] = []
        self.ledger = ledger
        self._specs: Mapping[Site, CodecSpec] = {}
        self._draw = 0
        self._noise = noise
        self._cache = cache
        self._backend = backend
        self._compact = compact

    def choose(self, specs: Mapping[Site, CodecSpec]) -> None:
        """Round these sites from now on, each by its codec and with noise not used before, and no others."""
        self._specs = specs
        self._draw += 1
        self._cache.clear()

    def put(
        self, tensor: Tensor, layout: Layout, site: Site, verdict: Verdict, spec: CodecSpec | None
    ) -> AnyPayload | None:
        """Keep a copy of the tensor."""
        assert verdict.spec is not None, "only what has a codec is watched"
        use = self.uses.setdefault(site, SiteUse(verdict.spec, verdict.kind, tensor.dtype, pinned=verdict.pinned))
        key = _signed(mix64(self._noise ^ site.stream, len(use.numels)))
        use.numels.append(layout.numel)
        flat = layout.flatten(tensor)
        kept = _EXACT
        if self._compact:
            own = verdict.spec.codec in ("relu", "fixed")
            kept = replace(verdict.spec if own else CodecSpec("uniform"), bits=_COMPACT_BITS, rounding="dither")
        charge = Charge(self.ledger, saved_bytes=kept.stored_bytes(layout.numel, tensor.dtype))
        encoded = encode(flat, kept, key=key, backend=self._backend)
        base = Payload(encoded, kept, layout.numel, tensor.dtype, key, self._backend, self._cache, (charge,))
        payload = ProbePayload(base, site, spec, key, self, layout)
        self.payloads.append(ref(payload))
        return payload

    def rounded(self, payload: ProbePayload) -> Tensor:
        """Return a segment as backward is to see it now."""
        raw, sign = payload.raw(), payload.sign
        spec = self._specs.get(payload.site)
        if spec is None:
            return raw
        if sign is None or not may_fold(spec):
            return self.coded(raw, spec, payload.key)
        flat = self.coded(_folded(payload, raw, sign), spec, payload.key, raw.dtype)
        sign.unfold_(payload.layout.unflatten(flat))
        return flat

    def segments(self, site: Site, spec: CodecSpec) -> Iterator[Tensor]:
        """Yield the tensors of a site as this codec would encode them, 1-D."""
        for reference in self.payloads:
            payload = reference()
            if payload is not None and payload.site == site:
                raw, sign = payload.raw(), payload.sign
                yield raw if sign is None or not may_fold(spec) else _folded(payload, raw, sign)

    def coded(self, raw: Tensor, spec: CodecSpec, key: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a segment encoded, and decoded to its own type or another, with this draw's noise."""
        key = _signed(mix64(key, self._draw))
        encoded = encode(raw, spec, key=key, backend=self._backend)
        return decode(encoded, spec, numel=raw.numel(), dtype=dtype or raw.dtype, key=key, backend=self._backend)


class ProbePayload:
    """Stands for a `Payload` in a probe: the segment as it is, rounded while `Rounding` says so.

    Args:
        base: The segment.
        site: Where it comes from.
        spec: The codec that it would have in training: sharing and derivation go by its bits.
        key: Its noise key.
        rounding: What is rounded.
        layout: Layout of the tensor.
    """

    __slots__ = (
        "__weakref__",
        "_base",
        "_behind",
        "_rounding",
        "_waits",
        "bits",
        "cache",
        "key",
        "layout",
        "numel",
        "sign",
        "site",
        "uses",
    )

    depth = 0

    def __init__(
        self, base: Payload, site: Site, spec: CodecSpec | None, key: int, rounding: Rounding, layout: Layout
    ) -> None:
        self._base = base
        self._behind: CodecSpec | None = None
        self._waits = False
        self.layout = layout
        self.sign: Sign | None = None  # of the ReLU behind, with whose help the segment is rounded
        self._rounding = rounding
        self.bits = EXACT_BITS if spec is None else spec.bits
        self.cache = base.cache
        self.key = key
        self.numel = base.numel
        self.site = site
        self.uses = 0

    def raw(self) -> Tensor:
        """Return the segment as it is."""
        return self._base.decode()

    def decode(self) -> Tensor:
        """Return the segment; the same values until `Rounding` changes."""
        return self._rounding.rounded(self)

    def wait(self, behind: CodecSpec | None) -> None:
        """Take the next sign that `settle` brings; ``behind`` is the site's codec then, if another."""
        self._waits, self._behind = True, behind

    def settle(self, sign: Sign | None = None) -> None:
        """Take the sign of a ReLU that follows, as `Undecided` does; or learn that there is none."""
        if self._waits and sign is not None and sign.size == self.layout.size:
            self.sign = sign
            if self._behind is not None:
                self._rounding.uses[self.site].default = self._behind
        self._waits = False


def _folded(payload: ProbePayload, raw: Tensor, sign: Sign) -> Tensor:
    layout = payload.layout
    return layout.flatten(sign.fold(layout.unflatten(raw)))


def may_fold(spec: CodecSpec) -> bool:
    """Whether a codec gains by the sign of a ReLU behind: with dithered groups nobody has measured it."""
    return spec.codec == "rotated"


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
