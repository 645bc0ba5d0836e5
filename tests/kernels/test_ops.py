"""The operators pass torch.library's own checks: schema, fake tensors, autograd registration, dynamic shapes."""

from __future__ import annotations

import pytest
import torch

from lightning_actmem_kernels import ops

GRID = ("uniform", "relu", "bfp")


def _cases():
    for numel in (1, 257, 1000):
        x = torch.rand(numel)
        for codec in GRID:
            encode, decode = getattr(ops, f"{codec}_encode"), getattr(ops, f"{codec}_decode")
            codes, grid = encode(x, 3, 64, "dither", -9, "torch")
            yield encode, (x, 3, 64, "dither", -9, "torch")
            yield decode, (codes, grid, 3, "dither", -9, numel, torch.bfloat16, "torch")
        codes, scales = ops.rotated_encode(x, 3, 64, True, -9, "torch")
        yield ops.rotated_encode, (x, 3, 64, True, -9, "torch")
        yield ops.rotated_decode, (codes, scales, 3, -9, numel, torch.float16, "torch")
        codes, exponents = ops.fp8_encode(x, "fp8_e4m3", 64, "stochastic", -9, "torch")
        yield ops.fp8_encode, (x, "fp8_e4m3", 64, "stochastic", -9, "torch")
        yield ops.fp8_decode, (codes, exponents, "fp8_e4m3", numel, torch.float16, "torch")
        codes = ops.fixed_encode(x, 3, 64, -0.5, 1.5, "dither", -9, "torch")
        yield ops.fixed_encode, (x, 3, 64, -0.5, 1.5, "dither", -9, "torch")
        yield ops.fixed_decode, (codes, 3, -0.5, 1.5, "dither", -9, numel, torch.bfloat16, "torch")
        bools, values = x < 0.5, torch.arange(numel)
        yield ops.mask_encode, (bools, "torch")
        yield ops.mask_decode, (ops.mask_encode(bools, "torch"), numel, "torch")
        for bits in (4, 16):
            yield ops.integer_encode, (values, bits)
            yield ops.integer_decode, (ops.integer_encode(values, bits), bits, torch.int64, values.numel())


@pytest.mark.parametrize(
    ("op", "args"), [pytest.param(op, args, id=f"{op}-{args[0].numel()}") for op, args in _cases()]
)
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ("op", "args"), [pytest.param(op, args, id=f"{op}-{args[0].numel()}") for op, args in _cases()]
)
def test_the_fake_knows_size_dtype_and_stride(op, args):
    real = op(*args)
    fake = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for r, f in zip(torch.utils._pytree.tree_leaves(real), torch.utils._pytree.tree_leaves(fake), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_every_operator_is_reachable_by_name():
    codecs = ("uniform", "rotated", "relu", "bfp", "fp8", "fixed", "mask", "integer")
    names = {f"{codec}_{way}" for codec in codecs for way in ("encode", "decode")}
    assert {name for name in dir(ops) if name in names} == names
    assert all(getattr(torch.ops.lightning_actmem, name).default is getattr(ops, name) for name in names)
