"""Chooses the codec of every site by the error that it makes on what the site really stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_actmem_kernels import CodecSpec, Layout, decode, encode
from lightning_actmem_kernels.spec import FP8, WIDTHS

from ..saved.identify import Verdict
from ..saved.site import Site

#: Where the choice is free. Others are what their operation needs: exact zeros, a fixed range.
_FREE = ("rotated", "uniform")
# Four pieces show the start, the middle and the end of a batch; a million elements, the error within 0.3 %.
_PIECES = 4
_PIECE_ELEMENTS = 1 << 18
_KEY = 0  # what is measured with this noise is thrown away


class _Measured(NamedTuple):
    """What has been measured at a site, and not yet read."""

    site: Site
    specs: list[CodecSpec]
    bits_per_element: list[float]
    errors: Tensor


class CodecChooser:
    """Chooses a codec for each site at the site's own bits: the one with the least error for its bytes.

    The first tensor of each site is encoded and decoded by every unbiased codec, at most a million elements of it. The
    errors stay on the device until `read`. Codecs differ a little in bytes, so errors are compared at equal bytes: a
    bit per element more quarters the mean square error, ``error * 4 ** bits_per_element``.

    Each rank chooses for itself: nobody else decodes what a rank stores.

    Args:
        settings: What the choices depend on; those made under other settings are not taken over.
        backend: Kernel backend, or ``None`` for the fastest.
    """

    def __init__(self, settings: Sequence[int | str], backend: str | None) -> None:
        self._settings = list(settings)
        self._backend = backend
        self._chosen: dict[Site, CodecSpec] = {}
        self._measured: dict[Site, _Measured] = {}

    def put(self, tensor: Tensor, layout: Layout, site: Site, verdict: Verdict, spec: CodecSpec | None) -> None:
        """Measure the codecs on the first tensor of a site.

        Args:
            tensor: The tensor.
            layout: Its layout.
            site: Where it comes from.
            verdict: What it is.
            spec: Its codec as things are; ``None`` keeps it exact.
        """
        if spec is None or verdict.pinned or spec.codec not in _FREE or site in self._chosen or site in self._measured:
            return
        specs = _candidates(spec)
        pieces = list(_pieces(layout.flatten(tensor), spec.group_size))
        errors = torch.stack([self._squared_error(pieces, each) for each in specs])
        bits = [8 * each.stored_bytes(layout.numel, tensor.dtype) / layout.numel for each in specs]
        self._measured[site] = _Measured(site, specs, bits, errors)

    def read(self) -> dict[Site, CodecSpec]:
        """Return the codec of every site measured so far; waits for the device if there are new ones."""
        if self._measured:
            self._chosen |= self._best()
            # Non-finite tensors tell nothing: their sites are measured again.
            self._measured.clear()
        return dict(self._chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return the choices: plain numbers and strings, loadable with ``weights_only=True``."""
        chosen = self._chosen | self._best()
        sites = [
            [site.layer, site.operation, site.role, site.ordinal, spec.codec, spec.bits, spec.centre]
            for site, spec in chosen.items()
        ]
        return {"settings": list(self._settings), "sites": sites}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the choices of a run under the same settings.

        Args:
            state: What `state_dict` returned.
        """
        self._measured.clear()
        self._chosen.clear()
        if list(state["settings"]) != self._settings:
            return
        *_, group_size, rounding = self._settings
        for *name, codec, bits, centre in state["sites"]:
            self._chosen[Site(*name)] = CodecSpec(codec, bits, int(group_size), str(rounding), centre)

    def _squared_error(self, pieces: list[Tensor], spec: CodecSpec) -> Tensor:
        total = []
        for piece in pieces:
            payload = encode(piece, spec, key=_KEY, backend=self._backend)
            back = decode(payload, spec, numel=piece.numel(), dtype=piece.dtype, key=_KEY, backend=self._backend)
            total.append((back.float() - piece.float()).square_().sum())
        return torch.stack(total).sum()

    def _best(self) -> dict[Site, CodecSpec]:
        """The best codec of each site in `_measured`, but for those whose errors are not finite."""
        measured = list(self._measured.values())
        by_device: dict[torch.device, list[_Measured]] = {}
        for each in measured:
            by_device.setdefault(each.errors.device, []).append(each)
        chosen: dict[Site, CodecSpec] = {}
        for group in by_device.values():
            errors = iter(torch.cat([each.errors for each in group]).tolist())  # waits once for each device
            for each in group:
                scores = [next(errors) * 4.0**bits for bits in each.bits_per_element]
                scores = [score if isfinite(score) else inf for score in scores]
                if min(scores) < inf:
                    chosen[each.site] = each.specs[scores.index(min(scores))]
        return {each.site: chosen[each.site] for each in measured if each.site in chosen}


def _candidates(spec: CodecSpec) -> list[CodecSpec]:
    """Every unbiased codec at the bits of `spec`, which stands first and so wins a tie."""
    codecs = [codec for codec in ("uniform", "rotated", "bfp", *FP8) if spec.bits in WIDTHS[codec]]
    found = [CodecSpec(codec, spec.bits, spec.group_size, spec.rounding) for codec in codecs]
    if "rotated" in codecs:
        found.append(CodecSpec("rotated", spec.bits, spec.group_size, spec.rounding, centre=True))
    return [spec, *(each for each in found if each != spec)]


def _pieces(flat: Tensor, group_size: int) -> Iterator[Tensor]:
    """Up to four pieces, evenly spaced from the first group to the last, that begin where a group does."""
    if flat.numel() <= _PIECES * _PIECE_ELEMENTS:
        yield flat
        return
    last = (flat.numel() - _PIECE_ELEMENTS) // group_size
    for index in range(_PIECES):
        start = last * index // (_PIECES - 1) * group_size
        yield flat[start : start + _PIECE_ELEMENTS]
