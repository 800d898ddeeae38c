"""torch.compile, torch.export, autocast, opcheck, memory and threads."""

import copy

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from memory_cases import in_a_process_of_its_own
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from qexport.memory.rss import extra_rss
from qexport.nn import QuantumMultiheadAttention, quantum_attention
from qexport.nn.functional import ATTRIBUTES
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.strategies import read_by

WIDTH, HEADS = 16, 4
HALVES = [{"num_samples": 3}] * 2 + [{"quantum_backend": "exact"}] * 2


def module(**settings):
    torch.manual_seed(0)
    settings = read_by(settings.get("quantum_backend", "stratified"), {"num_samples": 3}) | settings
    return QuantumMultiheadAttention(WIDTH, HEADS, batch_first=True, **settings).eval()


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fresh():
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", [{}, {"heads": HALVES}, {"dropout": 0.2, "backend": "reference"}], ids=str)
def test_compiled_is_eager(settings, fresh):
    """Forward and backward in one graph, with a float mask that is not contiguous; another seed is no other graph."""
    made = module(**settings)
    # inductor would only add minutes of its own compiling
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x, mask = rows(2, 9, WIDTH), rows(9, 9, seed=1).t()
    for seed in (0, 1, 12345678901234):
        made.seed.fill_(seed)
        found = []
        for run in (made, compiled):
            leaves = [x.clone().requires_grad_(), mask.clone().t().contiguous().t().requires_grad_()]
            y, weights = run(leaves[0], leaves[0], leaves[0], attn_mask=leaves[1])
            (y.square().sum() + weights.square().sum()).backward()
            found.append([y, weights, *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in made.parameters())])
            made.zero_grad()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
    assert fresh["stats"]["unique_graphs"] == 1
    assert fresh["graph_break"] == {}


def test_training_compiles(fresh):
    made = module(dropout=0.1).train()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = rows(2, 30, WIDTH)
    found = [compiled(x, x, x, need_weights=False)[0] for _ in range(3)]
    assert not torch.equal(found[0], found[1])
    found[2].sum().backward()
    assert made.in_proj_weight.grad.abs().max() > 0
    assert fresh["stats"]["unique_graphs"] == 1


def test_seeds_of_the_function_do_not_recompile(fresh):
    q = rows(1, 2, 20, 8)

    def run(seed):
        return quantum_attention(q, q, q, seed=seed, num_samples=3)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for seed in range(4):
        assert torch.equal(compiled(torch.tensor(seed)), run(seed))
    assert fresh["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("settings", [{}, {"heads": HALVES}], ids=str)
def test_exported_program(settings, tmp_path):
    """torch.export with free batch and length, through a file, at another seed than it was traced with."""
    made = module(**settings)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
    x, padding = rows(2, 9, WIDTH), torch.arange(9).expand(2, 9) > 7
    axes = {0: batch, 1: length}
    arguments = {"query": x, "key": x, "value": x, "key_padding_mask": padding}
    program = torch.export.export(made, (), arguments, dynamic_shapes=dict.fromkeys(arguments, axes))
    torch.export.save(program, tmp_path / "module.pt2")
    loaded = torch.export.load(tmp_path / "module.pt2").module()
    for shape in ((2, 9), (5, 23)):
        x = rows(*shape, WIDTH)
        arguments = {"query": x, "key": x, "value": x, "key_padding_mask": torch.arange(shape[1]).expand(shape) > 7}
        for a, b in zip(loaded(**arguments), made(**arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_autocast(backend):
    """As nn.MultiheadAttention: bfloat16 between float32 inputs and parameters, whose gradients are float32."""
    made = module(quantum_backend="exact", backend=backend)
    classical = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    classical.load_state_dict(made.state_dict())
    x = rows(2, 40, WIDTH)
    found = []
    for run in (made, classical):
        with torch.autocast("cpu", torch.bfloat16):
            y, weights = run(x, x, x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        found.append([y, weights.to(y.dtype), *(p.grad for p in run.parameters())])
    assert {g.dtype for g in found[0][2:]} == {torch.float32}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * max(1, b.float().abs().max().item()))


def test_autocast_does_not_reach_into_the_reference():
    """Probabilities in bfloat16 would be off by 2^-9."""
    q, k, v = (rows(1, 2, 30, 8, seed=i) for i in range(3))
    want = quantum_attention(q, k, v, num_samples=4, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantum_attention(q, k, v, num_samples=4, backend="reference"), want)


def call(q, k, v, mask=None, seed=3, need_weights=False, dropout_p=0.0, **attributes):
    """Positional arguments of the operator."""
    values = QUANTUM_ATTENTION.resolve({"num_samples": 4} | attributes)
    seed = torch.tensor(seed)
    return q, k, v, mask, seed, "auto", dropout_p, need_weights, *(values[name] for name in ATTRIBUTES)


@pytest.mark.parametrize("name", ["plain", "weights", "grouped_joined", "float_mask", "bool_mask", "strided", "bfloat16"])
def test_opcheck(name):
    q, k, v = rows(2, 4, 5, 8), rows(2, 4, 9, 8, seed=1), rows(2, 4, 9, 8, seed=2)
    mask, more = None, {"need_weights": name == "weights"}
    if name == "grouped_joined":
        q, k, v = rows(2, 5, 32), rows(2, 9, 16, seed=1), rows(2, 9, 12, seed=2)
        more |= {"q_num_heads": 4, "kv_num_heads": 2}
    elif name == "float_mask":
        mask = rows(9, 5, seed=3).t().requires_grad_()
    elif name == "bool_mask":
        mask = rows(4, 5, 9, seed=3) > -1
    elif name == "strided":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif name == "bfloat16":
        q, k, v = (x.bfloat16() for x in (q, k, v))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    arguments = call(*tensors, mask, **more)
    torch.library.opcheck(torch.ops.qexport.quantum_attention.default, arguments)

    y, weights = torch.ops.qexport.quantum_attention.default(*arguments)
    grads = torch.ones_like(y).detach(), torch.ones_like(weights).detach() if name == "weights" else None
    detached = [x.detach() if torch.is_tensor(x) else x for x in arguments]
    backward = (*grads, *detached[:5], *detached[6:7], *detached[8:])
    torch.library.opcheck(torch.ops.qexport.quantum_attention_backward.default, backward)


def test_inside_a_dispatch_mode_and_a_checkpoint():
    """Counting flops, and computing the forward again in the backward."""
    q = rows(2, 4, 5, 8).requires_grad_()

    def loss(q):
        return quantum_attention(q, q, q, num_samples=2).square().sum()

    (want,) = torch.autograd.grad(loss(q), q)
    with FlopCounterMode(display=False):
        (got,) = torch.autograd.grad(loss(q), q)
    assert torch.equal(got, want)
    y = torch.utils.checkpoint.checkpoint(loss, q, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y, q)[0], want)


LENGTH = 1 << 15


def extra_of_strided_inputs() -> int | None:
    q, k, v = torch.zeros(1, LENGTH, 3 * 64 * HEADS).chunk(3, -1)

    def call(length):
        inputs = q[:, :1], k[:, :length], v[:, :length]
        quantum_attention(*inputs, strategy="exact", q_num_heads=HEADS, kv_num_heads=HEADS)

    call(32)  # what the first call of all loads is not counted
    return extra_rss(lambda: call(LENGTH))


def test_strided_inputs_are_not_copied():
    """Keys and values of one projection are read where they lie: the call takes a small part of the memory of one."""
    extra = in_a_process_of_its_own(extra_of_strided_inputs)
    if extra is None:
        pytest.skip("this system does not tell")
    assert extra < 4 * 64 * HEADS * LENGTH / 16


def test_the_kernel_sees_the_memory_of_the_tensors(monkeypatch):
    from qexport import _core

    seen = []

    def watched(*arrays, **more):
        seen.extend(arrays[:3])
        return original(*arrays, **more)

    original = _core.quantum_attention
    monkeypatch.setattr(_core, "quantum_attention", watched)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        seen.clear()
        joined = rows(2, 9, 3 * WIDTH).to(dtype)
        parts = [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in joined.chunk(3, -1)]
        want = quantum_attention(*[x.contiguous() for x in parts], num_samples=4)
        seen.clear()
        assert torch.equal(quantum_attention(*parts, num_samples=4), want)
        for array, tensor in zip(seen, parts, strict=True):
            assert array.__array_interface__["data"][0] == tensor.data_ptr()
            assert not array.flags["C_CONTIGUOUS"]
            assert np.shares_memory(array.view(np.int16), joined.view(torch.int16).numpy())


@pytest.mark.parametrize("strategy", ["exact", "naive", "stratified", "adaptive", "hybrid", "tree"])
def test_thread_counts_give_the_same_bits(strategy):
    budget = read_by(strategy, {"num_samples": 64})
    made = module(quantum_backend=strategy, adaptive_samples=False, **budget)
    x = rows(1, 600, WIDTH)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            q = rows(1, HEADS, 600, 8)
            found.append(quantum_attention(q, q.flip(2), q, strategy=strategy, **budget))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    with torch.no_grad():
        classical = copy.deepcopy(made)
        classical.quantum_backend = "classical"
        assert not torch.equal(made(x, x, x)[0], classical(x, x, x)[0])
