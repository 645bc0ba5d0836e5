"""Batches of tensors that are in memory already: no worker processes, the same order in every run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """Iterates over two aligned tensors in batches, in a new random order in each epoch.

    Args:
        x: Inputs ``[samples, ...]``.
        y: Targets ``[samples, ...]``.
        batch_size: Samples per batch; what does not fill the last one is left out.
        shuffle_seed: Seed of the order, or ``None`` for the order as it is.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, shuffle_seed: int | None = None) -> None:
        self.x = x
        self.y = y
        self.batch_size = batch_size
        self._generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.x))
        if self._generator is not None:
            order = torch.randperm(len(self.x), generator=self._generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.x[chosen], self.y[chosen]
