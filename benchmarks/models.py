"""The models that are measured: own small definitions with the structure of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 100
IMAGE_SIZE = 96
WIDTH = 256
CONTEXT = 256
VOCABULARY = 1024
CHAIN_OPERATIONS = 500


@dataclass(frozen=True)
class Workload:
    """A model and a batch on a device.

    Args:
        model: The model, in training mode.
        blocks: What ``torch.utils.checkpoint`` is applied to, one by one.
        inputs: The batch.
        targets: The labels.
        autocast: Whether the forward pass runs in bfloat16.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    inputs: Tensor
    targets: Tensor
    autocast: bool = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.inputs.device

    def loss(self) -> Tensor:
        """Run the forward pass and the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.model(self.inputs).flatten(0, -2), self.targets.flatten())


class MlpBlock(nn.Module):
    """``x + down(gelu(up(norm(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Multi-head self-attention through ``scaled_dot_product_attention``."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.project(attended.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    """A block with the norm before each half and causal (GPT-2), or after it and bidirectional (BERT)."""

    def __init__(self, width: int, heads: int, gpt: bool, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm_first = gpt
        self.attention = Attention(width, heads, causal=gpt)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh" if gpt else "none"),
            nn.Linear(4 * width, width),
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for norm, half in zip(self.norms, (self.attention, self.mlp), strict=True):
            x = x + self.dropout(half(norm(x))) if self.norm_first else norm(x + self.dropout(half(x)))
        return x


class Transformer(nn.Module):
    """Token and position embeddings, blocks, and a head on every token (GPT-2, tied) or on the first one (BERT)."""

    def __init__(self, gpt: bool, width: int = WIDTH, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.gpt = gpt
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, gpt) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY if gpt else CLASSES, bias=not gpt)
        if gpt:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.dropout(self.tokens(ids) + self.positions)))
        return self.head(x if self.gpt else x[:, 0])


class Bottleneck(nn.Module):
    """The residual block of ResNet-50: 1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = self.expansion * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return self.relu(out)


class BasicBlock(nn.Module):
    """The residual block of ResNet-18: two 3 x 3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18 or ResNet-50 (He et al., 2016, Table 1).

    Args:
        block: The residual block.
        counts: Blocks in each of the four stages.
    """

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], counts: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        channels = 64
        for stage, count in enumerate(counts):
            for index in range(count):
                blocks.append(block(channels, 64 << stage, 2 if stage and not index else 1))
                channels = (64 << stage) * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(images))).flatten(1))


class Chain(nn.Module):
    """Many operations on very little data: its step time is the cost per operation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CLASSES))
        self.blocks = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        for _ in range(CHAIN_OPERATIONS):
            x = torch.tanh(x)
        return x


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))


def _images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(CLASSES, (batch,))


def _vectors(width: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randn(batch, width), torch.randint(CLASSES, (batch,)))


def _next_tokens(batch: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (batch, CONTEXT + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _sentences(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(VOCABULARY, (batch, CONTEXT)), torch.randint(CLASSES, (batch,))


def _mlp() -> nn.Module:
    model = nn.Sequential()
    model.blocks = nn.Sequential(*(MlpBlock(WIDTH) for _ in range(4)))
    model.norm = nn.LayerNorm(WIDTH)
    model.head = nn.Linear(WIDTH, CLASSES)
    return model


@dataclass(frozen=True)
class ModelSpec:
    """How to build a workload.

    Args:
        build: Returns the model; its ``blocks`` are what is checkpointed.
        data: Returns inputs and targets for a batch size.
        batch: Batch size where none is given.
    """

    build: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    batch: int


MODELS = {
    "mlp": ModelSpec(_mlp, _vectors(WIDTH), 1024),
    "gpt2": ModelSpec(lambda: Transformer(gpt=True), _next_tokens, 4),
    "bert": ModelSpec(lambda: Transformer(gpt=False), _sentences, 4),
    "resnet18": ModelSpec(lambda: ResNet(BasicBlock, (2, 2, 2, 2)), _images, 8),
    "resnet50": ModelSpec(lambda: ResNet(Bottleneck, (3, 4, 6, 3)), _images, 8),
    "chain": ModelSpec(Chain, _vectors(CLASSES), 1),
}


def workload(name: str, batch: int | None = None, device: str = "cpu", autocast: bool = False) -> Workload:
    """Build a model and a random batch, the same in every run.

    Args:
        name: One of `MODELS`.
        batch: Batch size, or ``None`` for the model's own.
        device: Where it goes.
        autocast: Whether the forward pass runs in bfloat16.

    Returns:
        The workload.
    """
    spec = MODELS[name]
    torch.manual_seed(0)
    model = spec.build().to(device).train()
    inputs, targets = spec.data(spec.batch if batch is None else batch)
    return Workload(model, tuple(model.blocks), inputs.to(device), targets.to(device), autocast)
