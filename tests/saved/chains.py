"""Chains of operations that can be derived, for the tests of derivation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layers(nn.Module):
    """Weights for the cases below; inputs are [2, 8, 6, 6] images or [2, 36, 8] sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.rms_norm = nn.RMSNorm(8)
        self.group_norm = nn.GroupNorm(2, 8)
        self.batch_norm = nn.BatchNorm2d(8)
        self.plain_batch_norm = nn.BatchNorm2d(8, affine=False)
        self.scale = nn.Parameter(torch.rand(8))


def sequence(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).contiguous()


def open_rms_norm(m: Layers, x: Tensor) -> Tensor:
    h = sequence(x).float()
    return m.scale * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


def rotary(x: Tensor) -> Tensor:
    h = sequence(x) * 1
    angle = torch.arange(h.shape[1], dtype=x.dtype)[:, None] * torch.rand(4).to(x.dtype)
    cos, sin = (torch.cat([f(angle)] * 2, 1) for f in (torch.cos, torch.sin))
    left, right = h.chunk(2, -1)
    return (h.square() * cos) + torch.cat((-right, left), -1).square() * sin


def in_place_block(m: Layers, x: Tensor) -> Tensor:
    out = F.relu(m.batch_norm(m.conv(x)), inplace=True)
    out = m.plain_batch_norm(m.conv(out))
    out += x
    return F.relu_(out)


#: A chain that ends in a tensor which the next layer would save; each must be derived and not stored.
CHAINS: dict[str, Callable[[Layers, Tensor], Tensor]] = {
    "relu": lambda m, x: F.relu(m.batch_norm(x)),
    "relu in place": lambda m, x: F.relu_(m.batch_norm(x)),
    "gelu": lambda m, x: F.gelu(x),
    "gelu tanh": lambda m, x: F.gelu(x, approximate="tanh"),
    "silu": lambda m, x: F.silu(x),
    "mish": lambda m, x: F.mish(x),
    "softplus": lambda m, x: F.softplus(x, beta=2.0),
    "elu": lambda m, x: F.elu(x, alpha=0.7),
    "hardswish": lambda m, x: F.hardswish(x),
    "selu": lambda m, x: F.selu(x),
    "celu": lambda m, x: F.celu(x, alpha=1.3),
    "log sigmoid": lambda m, x: F.logsigmoid(x),
    "soft sign": lambda m, x: F.softsign(x),
    "tanh shrink": lambda m, x: F.tanhshrink(x),
    "glu": lambda m, x: F.glu(torch.cat([x, x.square()], 1), 1),
    "tanh": lambda m, x: F.tanh(x),
    "sigmoid": lambda m, x: torch.sigmoid(x),
    "leaky relu": lambda m, x: F.leaky_relu(F.gelu(x), 0.2),
    "hard": lambda m, x: F.relu6(F.hardtanh(x, -0.5, 0.7) * 9) + F.hardsigmoid(x),
    "clamped": lambda m, x: F.threshold(x.clamp(-0.5, 0.7), 0.1, 0.05) + x.clamp_min(-1).clamp_max(2) + x.clip(-1, 1),
    "exponential": lambda m, x: x.exp() + torch.exp2(x) + torch.expm1(x),
    "trigonometric": lambda m, x: x.sin() + x.cos() + torch.sinc(x) + torch.erf(x),
    "interpolated": lambda m, x: torch.lerp(x, x.square(), 0.3),
    "fused product": lambda m, x: torch.addcmul(x, x.sin(), x.cos(), value=0.5),
    "difference": lambda m, x: (-F.gelu(x) - x.cos()).neg(),
    "float power": lambda m, x: torch.float_power(x, 2).to(x.dtype),
    "softmax": lambda m, x: torch.softmax(x, 1),
    "masked": lambda m, x: F.gelu(x).masked_fill(torch.ones_like(x).tril() == 0, 0.5),
    "where": lambda m, x: torch.where(torch.ones_like(x).triu() == 1, F.gelu(x), F.silu(x)),
    "dropout of channels": lambda m, x: F.dropout2d(F.gelu(x), 0.4),
    "dropout of rows": lambda m, x: F.dropout1d(F.gelu(x).flatten(2), 0.4).view(x.shape),
    "dropout of volumes": lambda m, x: F.dropout3d(F.gelu(x)[:, :, None], 0.4)[:, :, 0],
    "product": lambda m, x: torch.multiply(F.gelu(x), F.silu(x)),
    "stacked": lambda m, x: torch.stack([F.gelu(x), F.silu(x)], 1).flatten(0, 1),
    "half precision": lambda m, x: F.gelu(x).bfloat16().type_as(x).half().float().clone(),
    "reshaped copy": lambda m, x: F.gelu(x).transpose(2, 3).reshape(x.shape),
    "square": lambda m, x: x.square(),
    "power": lambda m, x: x**3,
    "layer norm": lambda m, x: m.layer_norm(sequence(x)),
    "rms norm": lambda m, x: m.rms_norm(sequence(x)),
    "open rms norm": open_rms_norm,
    "group norm": lambda m, x: m.group_norm(x),
    "batch norm": lambda m, x: m.batch_norm(x),
    "batch norm without weights": lambda m, x: m.plain_batch_norm(x),
    "batch norm in evaluation": lambda m, x: m.eval().batch_norm(x) * 1,
    "dropout": lambda m, x: F.dropout(F.gelu(x), 0.4),
    "scaled": lambda m, x: 3 * F.gelu(x) / 2 - 1,
    "cast": lambda m, x: F.gelu(x).to(torch.bfloat16).float(),
    "permuted copy": lambda m, x: F.gelu(x).permute(0, 2, 3, 1).contiguous(),
    "chunks and cat": lambda m, x: torch.cat([F.gelu(part) for part in x.chunk(2, 1)], 1),
    "swiglu": lambda m, x: F.silu(x) * (x * 2).square().sqrt(),
    "geglu": lambda m, x: F.gelu(x) * F.silu(x),
    "gelu_new": lambda m, x: gelu_new(x),
    "rotary": lambda m, x: rotary(x),
    "residual": lambda m, x: F.gelu(x) + F.silu(x),
    "in-place residual block": in_place_block,
}


#: Chains that begin with an operation which saves less than its input: there is nothing to derive their end from.
WITHOUT_INPUT = {"tanh shrink", "hard", "clamped", "float power"}
#: Chains that change the type, or draw random numbers, which depend on it.
CASTS = {"cast", "half precision", "open rms norm", "dropout", "dropout of channels", "dropout of rows"}
CASTS |= {"dropout of volumes"}
#: Derived for attention only, see test_attention; and what torch itself calls from its dropouts.
IN_OTHER_TESTS = {"matmul", "bmm", "baddbmm", "feature_dropout"}
