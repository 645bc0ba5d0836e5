"""Prints the gradient error of a trained GPT whose attention is stored in few bits, consistently and not.

Run ``python -m benchmarks.attention --text FILE``. The net of `benchmarks.convergence` is trained plainly first, so
that its scores are sharp. Then queries, keys and values are rounded and everything else stays exact; a last column
packs everything at those bits. "Inconsistent" leaves the kernel its exact output and log-sum-exp beside the rounded
queries and keys, as a hook that looks at one tensor at a time does; "consistent" computes both again from what is
stored.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.convergence import BATCH, CONTEXT, LEARNING_RATE, CharacterModel, encode, windows
from lightning_actmem import ActMemEngine
from lightning_actmem.saved.attention import recomputed_attention
from lightning_actmem_kernels import CodecSpec, Layout
from lightning_actmem_kernels import decode as decode_values
from lightning_actmem_kernels import encode as encode_values

CODECS = {
    "min-max, stochastic rounding": {"codec": "uniform", "rounding": "stochastic"},
    "rotated": {"codec": "rotated", "rounding": "dither"},
}
WIDTHS = (2, 4)


class RoundedAttention(TorchFunctionMode):
    """Rounds what attention saves of its inputs, and nothing else.

    Args:
        spec: The codec; ``None`` only looks at the scores.
        consistent: Whether backward computes the rest again from the rounded inputs.
        keys: Numbers of the noise, one for each rounded tensor.
    """

    def __init__(
        self, spec: CodecSpec | None, consistent: bool = True, keys: itertools.count[int] | None = None
    ) -> None:
        super().__init__()
        self._spec = spec
        self._consistent = consistent
        self._keys = keys
        self.largest_score = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run attention with hooks around it, and everything else as it is."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        if self._spec is None:
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            self.largest_score = max(self.largest_score, float(scores.detach().abs().max()))
            return func(*args, **kwargs)
        inputs = {tensor.data_ptr() for tensor in (query, key, value)}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self._pack(tensor, inputs), lambda unpack: unpack()
        ):
            return recomputed_attention(func, args, kwargs) if self._consistent else func(*args, **kwargs)

    def _pack(self, tensor: Tensor, inputs: set[int]) -> Callable[[], Tensor]:
        if tensor.data_ptr() not in inputs or self._spec is None or self._keys is None:
            kept = tensor.detach()
            return lambda: kept
        layout, spec, key = Layout.of(tensor), self._spec, next(self._keys)
        assert layout is not None, "queries, keys and values are plain tensors"
        payload = encode_values(layout.flatten(tensor.detach()), spec, key=key)
        numel, dtype = layout.numel, tensor.dtype
        return lambda: layout.unflatten(decode_values(payload, spec, numel=numel, dtype=dtype, key=key))


def train(text: str, steps: int) -> tuple[CharacterModel, tuple[Tensor, Tensor]]:
    """Return a net that has learned for that many steps, and a batch it has not seen."""
    torch.manual_seed(0)
    ids, characters = encode(text)
    model = CharacterModel(characters)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        loss = model(*windows(ids, torch.randint(len(ids) - CONTEXT - 1, (BATCH,))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), windows(ids, torch.randint(len(ids) - CONTEXT - 1, (BATCH,)))


def relative_error(model: CharacterModel, loss_of: Callable[[], Tensor], exact: Tensor, draws: int) -> float:
    """Return the squared error of the gradient over its squared size, on average over draws of the noise."""
    errors = [float((gradient(model, loss_of()) - exact).square().sum()) for _ in range(draws)]
    return sum(errors) / draws / float(exact.square().sum())


def gradient(model: CharacterModel, loss: Tensor) -> Tensor:
    """Return the gradient as one vector."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]).double()


def attention_loss(model: CharacterModel, batch: tuple[Tensor, Tensor], mode: RoundedAttention) -> Tensor:
    """Return the loss of a forward pass whose attention is rounded."""
    with mode:
        return model(*batch)


def packed_loss(model: CharacterModel, batch: tuple[Tensor, Tensor], engine: ActMemEngine) -> Tensor:
    """Return the loss of a forward pass that is packed as a whole."""
    with engine.compress(model, inputs=batch):
        return model(*batch)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args(arguments)
    model, batch = train(options.text.read_text(), options.steps)
    look = RoundedAttention(None)
    exact = gradient(model, attention_loss(model, batch, look))
    print(f"Largest score: {look.largest_score:.0f}\n")
    print("| codec, bits | inconsistent | consistent | consistent, everything packed |\n|---|---|---|---|")
    keys = itertools.count()
    for (name, settings), bits in itertools.product(CODECS.items(), WIDTHS):
        spec = CodecSpec(settings["codec"], bits, rounding=settings["rounding"])
        modes = [RoundedAttention(spec, consistent, keys) for consistent in (False, True)]
        losses = [partial(attention_loss, model, batch, mode) for mode in modes]
        engine = ActMemEngine(**settings, bits=bits, attention_bits=bits)
        losses.append(partial(packed_loss, model, batch, engine))
        cells = [relative_error(model, loss_of, exact, options.draws) for loss_of in losses]
        print(f"| {name}, {bits} | " + " | ".join(f"{cell:.2g}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
