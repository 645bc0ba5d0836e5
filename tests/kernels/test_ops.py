"""The operators pass torch.library's own checks: schema, fake tensors, autograd registration, dynamic shapes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_actmem_kernels import CodecSpec, decode, encode, ops
from lightning_actmem_kernels.reference import uniform

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


class Listener(TorchDispatchMode):
    """Writes down which operators run."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "args"), [pytest.param(op, args, id=f"{op}-{args[0].numel()}") for op, args in _cases()]
)
def test_a_direct_call_returns_the_same_and_a_mode_hears_the_operator(op, args):
    codec, way = op._schema.name.removeprefix("lightning_actmem::").rsplit("_", 1)
    parameters = args if codec == "integer" else args[:-1]

    def run():
        return getattr(ops.implementation(codec, "torch", args[0]), way)(*parameters)

    direct, dispatched, listener = run(), op(*args), Listener()
    with listener:
        heard = run()
    assert listener.heard[0] is op
    for tensors in zip(*map(torch.utils._pytree.tree_leaves, (direct, dispatched, heard)), strict=True):
        assert all(torch.equal(t, tensors[0]) for t in tensors)


def test_fake_tensors_and_the_compiler_get_the_operator():
    spec = CodecSpec("uniform", 4)
    with FakeTensorMode():
        codes, grids = encode(torch.empty(1000), spec, key=1)
        assert (type(codes), codes.shape, grids.shape) == (FakeTensor, (4, 4, 32), (4,))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def packed(x):
        payload = encode(x, spec, key=1)
        return *payload, decode(payload, spec, numel=1000, dtype=x.dtype, key=1)

    x = torch.randn(1000)
    payload = encode(x, spec, key=1)
    restored = decode(payload, spec, numel=1000, dtype=x.dtype, key=1)
    assert all(map(torch.equal, packed(x), (*payload, restored)))
    targets = {node.target for graph in graphs for node in graph.graph.nodes}
    assert {ops.uniform_encode, ops.uniform_decode} <= targets


def test_where_nobody_listens_the_module_of_the_backend_runs():
    assert ops.implementation("uniform", "torch", torch.empty(1)) is uniform
    with Listener():
        assert ops.implementation("uniform", "torch", torch.empty(1)) is not uniform
    assert ops.implementation("uniform", "torch", torch.nn.Parameter(torch.empty(1))) is not uniform
