"""Prints what each model stores for its backward pass, plain and packed, as a table in Markdown.

Run ``python -m benchmarks.stored`` (needs transformers, from the ``test`` extra). Bytes are exact and the same on every
machine with the same versions. Weights, buffers, the batch and what the loss saves are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.models import workload
from lightning_actmem import ActMemEngine

VOCABULARY = 512
LENGTH = 128
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "2 bits": {"bits": 2},
    "4 bits, no floor": {"bits": 4, "attention_bits": 4},
    "2 bits, no floor": {"bits": 2, "attention_bits": 2},
    "2 bits, no derivation": {"bits": 2, "derive": False},
    "lossless, derived": {"bits": 32, "derive": True},
}
NOT_COUNTED = frozenset(["weight", "buffer", "input", "loss"])
SIZE = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4}
Step = Callable[[], Tensor]


def language_model(model: nn.Module) -> tuple[nn.Module, Any, Step]:
    ids = torch.randint(0, VOCABULARY, (4, LENGTH))
    return model, ids, lambda: model(input_ids=ids, labels=ids).loss


def gpt2() -> tuple[nn.Module, Any, Step]:
    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=4, vocab_size=VOCABULARY, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    return language_model(GPT2LMHeadModel(config))


def llama() -> tuple[nn.Module, Any, Step]:
    return language_model(
        LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2, intermediate_size=688, vocab_size=VOCABULARY))
    )


def bert() -> tuple[nn.Module, Any, Step]:
    model = BertForSequenceClassification(BertConfig(**SIZE, intermediate_size=1024, vocab_size=VOCABULARY))
    ids = torch.randint(0, VOCABULARY, (4, LENGTH))
    padding = torch.ones_like(ids)
    padding[:, LENGTH * 3 // 4 :] = 0
    labels = torch.zeros(4, dtype=torch.long)
    return model, (ids, padding), lambda: model(input_ids=ids, attention_mask=padding, labels=labels).loss


def vit() -> tuple[nn.Module, Any, Step]:
    model = ViTForImageClassification(
        ViTConfig(**SIZE, intermediate_size=1024, image_size=96, patch_size=8, num_labels=10)
    )
    images = torch.randn(4, 3, 96, 96)
    return model, images, lambda: model(pixel_values=images, labels=torch.arange(4)).loss


def resnet(name: str) -> tuple[nn.Module, Any, Step]:
    model = workload(name, 1).model
    images = torch.randn(4, 3, 128, 128)
    return model, images, lambda: F.cross_entropy(model(images), torch.arange(4))


MODELS = {
    "ResNet-50": partial(resnet, "resnet50"),
    "ResNet-18": partial(resnet, "resnet18"),
    "ViT": vit,
    "BERT": bert,
    "GPT-2": gpt2,
    "Llama": llama,
}


def bytes_by_kind(
    model: nn.Module, inputs: Any, step: Step, autocast: bool, config: dict[str, Any]
) -> dict[str, tuple[int, int]]:
    """Return the bytes of plain autograd and the bytes stored instead, by kind of tensor."""
    engine = ActMemEngine(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), engine.compress(model, inputs=inputs):
        step()
    return engine.report().bytes_by_kind


def ratio(kinds: dict[str, tuple[int, int]]) -> tuple[int, float]:
    """Return the bytes of plain autograd, and how many times fewer are stored."""
    counted = [pair for kind, pair in kinds.items() if kind not in NOT_COUNTED]
    raw_bytes, saved_bytes = (sum(column) for column in zip(*counted, strict=True))
    return raw_bytes, raw_bytes / saved_bytes


def mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.3g}"


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print("| model | weights, MiB | loss, MiB | plain, MiB | " + " | ".join(CONFIGURATIONS) + " |")
    print("|---" * (4 + len(CONFIGURATIONS)) + "|")
    for name, build in MODELS.items():
        model, inputs, step = build()
        weights = mebibytes(sum(parameter.nbytes for parameter in model.parameters()))
        for autocast in (False, True):
            found = [bytes_by_kind(model, inputs, step, autocast, config) for config in CONFIGURATIONS.values()]
            loss, plain = found[0].get("loss", (0, 0))[0], ratio(found[0])[0]
            figures = " | ".join(f"{ratio(kinds)[1]:.1f}x" for kinds in found)
            label = f"{name}, {'bf16' if autocast else 'fp32'}"
            print(f"| {label} | {weights} | {mebibytes(loss)} | {mebibytes(plain)} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
