"""Models that tests measure on: small enough for two cores, with the structure of the real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.models import Bottleneck


class ResNet(nn.Module):
    """ResNet with bottleneck blocks; the defaults are those of ResNet-50."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(Bottleneck(channels, width << stage, 2 if stage and not block else 1))
                channels = 4 * (width << stage)
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.layers(self.stem(x))), 1))


class MlpBlock(nn.Module):
    """A pre-norm residual block with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def mlp(width: int = 128, depth: int = 3, classes: int = 10) -> nn.Sequential:
    """Return a pre-norm GELU MLP; input ``[batch, width]``."""
    return nn.Sequential(*(MlpBlock(width) for _ in range(depth)), nn.LayerNorm(width), nn.Linear(width, classes))


def gpt2(attention: str = "sdpa", dropout: float = 0.1) -> GPT2LMHeadModel:
    """Return a two-layer GPT-2 with random weights; input: token ids below 256, at most 128 of them."""
    config = GPT2Config(
        n_layer=2,
        n_embd=128,
        n_head=4,
        vocab_size=256,
        n_positions=128,
        attn_implementation=attention,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).train()


def bert(attention: str = "sdpa", dropout: float = 0.1) -> BertForSequenceClassification:
    """Return a two-layer BERT classifier with random weights; input as for `gpt2`."""
    config = BertConfig(
        num_hidden_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        intermediate_size=512,
        vocab_size=256,
        attn_implementation=attention,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).train()


def llama(attention: str = "sdpa", dropout: float = 0.1) -> LlamaForCausalLM:
    """Return a two-layer Llama with grouped queries (4 heads, 2 of keys) and random weights; input as for `gpt2`."""
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=352,
        vocab_size=256,
        max_position_embeddings=128,
        attn_implementation=attention,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config).train()
