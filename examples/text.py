"""A small transformer that learns to write Python's own documentation, character by character."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from batches import Batches

CONTEXT = 128
VALIDATION_WINDOWS = 256
LEARNING_RATE = 2e-3


def text_batches(batch_size: int, seed: int) -> tuple[Batches, Batches, int]:
    """Cut the help topics that Python's ``help()`` shows (about 700,000 characters) into windows.

    Args:
        batch_size: Windows per batch.
        seed: Seed of the training order.

    Returns:
        Training batches, validation batches (the end of the text), and the number of different characters.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    ids = torch.tensor([number[character] for character in text])
    windows = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    training, validation = windows[:-VALIDATION_WINDOWS], windows[-VALIDATION_WINDOWS:]
    return (
        Batches(training[:, :-1], training[:, 1:], batch_size, shuffle_seed=seed),
        Batches(validation[:, :-1], validation[:, 1:], batch_size),
        len(characters),
    )


class Block(nn.Module):
    """A pre-norm decoder block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(attended.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.mlp(x))


class TextModel(LightningModule):
    """A decoder-only transformer. There is nothing about compression in here: that is the point.

    Args:
        characters: Size of the vocabulary.
        width: Size of the embedding.
        depth: Number of blocks.
        heads: Attention heads per block.
        dropout: Share of values dropped after each half of a block.
    """

    def __init__(self, characters: int, width: int = 128, depth: int = 4, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of each next character: ``[batch, length]`` to ``[batch, length, characters]``."""
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.position)))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, next_ids = batch
        return F.cross_entropy(self(ids).flatten(0, 1), next_ids.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
