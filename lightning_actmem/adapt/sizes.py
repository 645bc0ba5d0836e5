"""How many bytes each site stores in training, as far as it rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_actmem_kernels import CodecSpec

from ..saved.ledger import BORROWED, Ledger
from ..saved.probe import SiteUse
from ..saved.site import Site
from .state import as_list

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_actmem_kernels import Layout

    from ..saved.identify import Verdict
    from ..saved.payload import AnyPayload


class Sizes:
    """The largest training step so far: a last, smaller batch must not set the budget.

    Args:
        uses: What its sites stored.
        fixed_bytes: Activation bytes that no choice of codecs changes: masks, statistics, what stays exact.
    """

    def __init__(self) -> None:
        self.uses: dict[Site, SiteUse] = {}
        self.fixed_bytes = 0
        self._step: dict[Site, SiteUse] = {}
        self._due = True

    def put(
        self, tensor: Tensor, layout: Layout, site: Site, verdict: Verdict, spec: CodecSpec | None
    ) -> AnyPayload | None:
        """Note the tensor and leave it to the store."""
        use = self._step.get(site)
        if use is None:
            assert verdict.spec is not None, "only what has a codec is watched"
            use = self._step[site] = SiteUse(verdict.spec, verdict.kind, tensor.dtype, pinned=verdict.pinned)
        use.numels.append(layout.numel)
        return None

    def end_step(self, ledger: Ledger) -> None:
        """Keep the step if none was larger."""
        step, self._step = self._step, {}
        if self._due or _elements(step) >= _elements(self.uses):
            self._due = False
            self.uses = step
            self.fixed_bytes = sum(
                row.saved_bytes for row in ledger.rows if row.site not in step and row.kind not in BORROWED
            )

    def renew(self) -> None:
        """Take the next step whatever its size: a new plan may store other tensors."""
        self._due = True

    def state(self) -> dict[str, Any]:
        """Return everything as lists, texts and numbers."""
        uses = [
            [list(site), as_list(use.default), use.kind, str(use.dtype), list(use.numels), use.pinned]
            for site, use in self.uses.items()
        ]
        return {"uses": uses, "fixed_bytes": self.fixed_bytes, "due": self._due}

    def load(self, state: dict[str, Any]) -> None:
        """Take what `state` returned."""
        self.uses = {
            Site(*site): SiteUse(
                CodecSpec(*default), kind, getattr(torch, dtype.partition(".")[2]), list(numels), pinned
            )
            for site, default, kind, dtype, numels, pinned in state["uses"]
        }
        self.fixed_bytes = int(state["fixed_bytes"])
        self._due = bool(state["due"])


def _elements(uses: dict[Site, SiteUse]) -> int:
    return sum(sum(use.numels) for use in uses.values())
