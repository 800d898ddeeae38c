"""What qexport.nn refuses: torch's exception types where torch has the check, one line that names the argument elsewhere."""

import re
import sys

import pytest
import torch
from torch import nn

from qexport.errors import QexportError, UsageError
from qexport.nn import QuantumMultiheadAttention, quantum_attention

WIDTH, HEADS = 16, 4


def rows(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def same(**more):
    return (rows(5, 2, 16),) * 3, more


def flat(**more):
    return (rows(5, 16),) * 3, more


# name: ((inputs, keyword arguments), what the message names)
FORWARD = {
    "query_width": (((rows(5, 2, 15), rows(7, 2, 16), rows(7, 2, 16)), {}), "query: was expecting .* 16, but got 15"),
    "key_and_value_width": (((rows(5, 2, 16), rows(7, 2, 15), rows(7, 2, 15)), {}), "key: was expecting .* 16, but got 15"),
    "value_width": (((rows(5, 2, 16), rows(7, 2, 16), rows(7, 2, 15)), {}), r"key shape .*16\) .* value shape .*15\)"),
    "value_length": (((rows(5, 2, 16), rows(7, 2, 16), rows(6, 2, 16)), {}), r"key shape \(7.* value shape \(6"),
    "batch": (((rows(5, 2, 16), rows(7, 3, 16), rows(7, 3, 16)), {}), "query and key .* batch size, got 2 and 3"),
    "four_dimensions": (((rows(1, 5, 2, 16),) * 3, {}), "query should be .* 4-D"),
    "mixed_dimensions": (((rows(5, 2, 16), rows(7, 16), rows(7, 16)), {}), "`key` and `value`"),
    "mask_shape": (same(attn_mask=rows(5, 6)), r"attn_mask is \(5, 6\), but should be \(5, 5\)"),
    "mask_shape_per_head": (same(attn_mask=rows(7, 5, 5)), r"attn_mask is \(7, 5, 5\), but should be \(8, 5, 5\)"),
    "mask_dimensions": (same(attn_mask=rows(5)), "`attn_mask`"),
    "mask_type": (same(attn_mask=torch.zeros(5, 5, dtype=torch.int64)), "attn_mask .* torch.int64"),
    "unbatched_mask": (flat(attn_mask=rows(3, 5, 5)), r"`attn_mask` shape to be \(4, 5, 5\)"),
    "padding_shape": (same(key_padding_mask=torch.zeros(2, 4, dtype=torch.bool)), r"key_padding_mask .*\(2, 5\).*\(2, 4\)"),
    "padding_batch": (same(key_padding_mask=torch.zeros(3, 5, dtype=torch.bool)), r"key_padding_mask .*\(2, 5\).*\(3, 5\)"),
    "padding_dimensions": (same(key_padding_mask=torch.zeros(5, dtype=torch.bool)), "`key_padding_mask`"),
    "padding_type": (same(key_padding_mask=torch.zeros(2, 5, dtype=torch.int64)), "key_padding_mask .* torch.int64"),
    "causal_without_mask": (same(is_causal=True), "attn_mask .* is_causal"),
    "input_type": (((rows(5, 2, 16, dtype=torch.float64),) * 3, {}), "dtype"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_raises_what_torch_raises(name):
    (inputs, more), words = FORWARD[name]
    theirs = nn.MultiheadAttention(WIDTH, HEADS)
    with pytest.raises(Exception) as wanted:  # noqa: PT011
        theirs(*inputs, **more)
    for quantum in ({}, {"quantum_backend": "exact", "backend": "reference"}, {"heads": [{"num_samples": 2}] * HEADS}):
        with pytest.raises(wanted.type, match=words) as caught:
            QuantumMultiheadAttention(WIDTH, HEADS, **quantum)(*inputs, **more)
        assert caught.type is wanted.type
        assert "\n" not in str(caught.value)


def test_widths_of_keys_and_values_of_their_own():
    theirs, ours = (kind(WIDTH, HEADS, kdim=6, vdim=8) for kind in (nn.MultiheadAttention, QuantumMultiheadAttention))
    for inputs, words in (
        ((rows(5, 2, 16), rows(7, 2, 5), rows(7, 2, 8)), "key: was expecting embedding dimension of 6, but got 5"),
        ((rows(5, 2, 16), rows(7, 2, 6), rows(7, 2, 9)), "value: was expecting embedding dimension of 8, but got 9"),
        ((rows(5, 2, 16), rows(7, 2, 6), rows(6, 2, 8)), r"key shape \(7, 2, 6\) does not match value shape \(6, 2, 8\)"),
    ):
        with pytest.raises(Exception) as wanted:  # noqa: PT011
            theirs(*inputs)
        with pytest.raises(wanted.type, match=words):
            ours(*inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quantum_backend": "qubits"}, "quantum_backend must be one of classical, exact, naive, .* got 'qubits'"),
        ({"backend": "qpu"}, "backend must be one of auto, kernel, .*reference.* got 'qpu'"),
        ({"num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"num_samples": [4] * HEADS}, r"num_samples must be a whole number, got \[4, 4, 4, 4\]; heads takes one per head"),
        ({"num_samples": True}, "num_samples must be a whole number, got True"),
        ({"control_variate": "yes"}, "control_variate must be of kind int, got 'yes'"),
        ({"control_variate": 2}, "control_variate must be one of 0, 1, got 2"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, int8, auto, got 'fp8'"),
        ({"precision": "int8"}, "precision must be fp32 or auto with strategy adaptive, got int8"),
        ({"error_tolerance": 0.1}, "error_tolerance needs strategy tree, got adaptive"),
        (
            {"quantum_backend": "exact", "num_samples": 4},
            "num_samples needs strategy naive, .* or tree, got exact; leave num_s",
        ),
        ({"num_samples": 2**31}, "num_samples must be <= 2147483647, got 2147483648"),
        ({"layer": 1.5}, "layer must be of kind int, got 1.5"),
        ({"residual": "unbiased"}, "residual needs strategy tree, got adaptive; leave residual out"),
        ({"quantum_backend": "tree", "error_tolerance": 2}, "error_tolerance must be <= 1, got 2"),
        ({"quantum_backend": "tree", "residual": "some"}, "residual must be one of none, .* got 'some'"),
        ({"layer": -1}, "layer must be >= 0, got -1"),
        ({"seed": 2**63}, rf"seed must be a whole number of 64 bits, -2\^63 to 2\^63 - 1, got {2**63}"),
        ({"seed": 0.5}, r"seed must be .* 64 bits, .*, got 0\.5"),
        ({"heads": [{}] * 3}, "heads must have one entry for each of the 4 heads, got 3"),
        ({"heads": [{}] * 3 + [{"samples": 3}]}, r"heads\[3\] has no key 'samples'; known: quantum_backend, num_samples, "),
        ({"heads": [{}] * 3 + [{"num_samples": 0}]}, r"heads\[3\]: num_samples must be >= 1, got 0"),
        (
            {"heads": [{"quantum_backend": "classical"}] * 4},
            r"heads\[0\]: quantum_backend must be one of exact, .*'classical'",
        ),
        ({"heads": [{"error_tolerance": 0.1}] * 4}, r"heads\[0\]: error_tolerance needs strategy tree"),
        ({"heads": [{"quantum_backend": "exact", "num_samples": 3}] * 4}, r"heads\[0\]: num_samples needs .* got exact"),
        ({"heads": [{"num_samples": 3}] * 4, "quantum_backend": "exact"}, r"heads\[0\]: num_samples needs .* got exact"),
        (
            {"heads": [{"quantum_backend": "tree", "control_variate": True}] * 4},
            r"heads\[0\]: control_variate needs .* tree",
        ),
        ({"heads": {"num_samples": 3}}, "heads must be a list with one dict per head"),
        ({"heads": ["stratified"] * 4}, "heads must be a list with one dict per head"),
        ({"heads": [{}] * 4, "quantum_backend": "classical"}, "heads needs a quantum_backend that samples, got classical"),
    ],
    ids=str,
)
def test_constructor(arguments, words):
    with pytest.raises(UsageError, match=words) as caught:
        QuantumMultiheadAttention(WIDTH, HEADS, **arguments)
    assert "\n" not in str(caught.value)


def test_kernel_limits():
    x = rows(2, 5, WIDTH)
    module = QuantumMultiheadAttention(WIDTH, HEADS, dropout=0.1, backend="kernel", batch_first=True)
    with pytest.raises(UsageError, match=r"backend kernel has no dropout, got dropout_p 0\.1; take backend reference"):
        module(x, x, x)
    module.eval()(x, x, x)
    module.to(torch.float64)
    with pytest.raises(
        UsageError, match="takes float32, float16, bfloat16 on the CPU or a CUDA device, got float64 on cpu; take"
    ):
        module(x.double(), x.double(), x.double())
    meta = [x.to("meta").unflatten(-1, (HEADS, -1))] * 3
    with pytest.raises(UsageError, match="got float32 on meta"):
        quantum_attention(*meta, backend="kernel")


def test_a_tree_without_kernels(monkeypatch):
    from qexport.nn import backends, cuda

    for module in (backends, cuda):
        monkeypatch.setattr(module, "kernels", lambda: None)
    q = rows(1, 2, 3, 4)
    with pytest.raises(QexportError, match="installed without its kernels; take backend reference, or reinstall"):
        quantum_attention(q, q, q, backend="kernel")
    assert torch.equal(quantum_attention(q, q, q), quantum_attention(q, q, q, backend="reference")), (
        "what auto falls back to"
    )


Q4, K4 = (2, 4, 5, 8), (2, 2, 7, 8)
OPERATOR = {
    "batch": ((Q4, (3, 2, 7, 8), (3, 2, 7, 8)), {}, "Q, K and V do not fit each other, got Q (2, 4, 5, 8), K (3, 2, 7, 8)"),
    "heads": ((Q4, (2, 3, 7, 8), (2, 3, 7, 8)), {}, "Q, K and V do not fit each other"),
    "value_heads": ((Q4, K4, (2, 4, 7, 8)), {}, "Q, K and V do not fit each other"),
    "head_size": ((Q4, (2, 2, 7, 9), K4), {}, "Q, K and V do not fit each other"),
    "no_key_heads": ((Q4, (2, 0, 7, 8), (2, 0, 7, 8)), {}, "Q, K and V do not fit each other"),
    "lengths": ((Q4, K4, (2, 2, 6, 8)), {}, "Q, K and V do not fit each other"),
    "dimensions": ((Q4, (2, 7, 16), (2, 7, 16)), {}, "must all have 4 dimensions, or all 3"),
    "no_head_counts": (((2, 5, 32), (2, 7, 16), (2, 7, 16)), {}, "3-D inputs need q_num_heads and kv_num_heads"),
    "joined_widths": (
        ((2, 5, 32), (2, 7, 16), (2, 7, 16)),
        {"q_num_heads": 4, "kv_num_heads": 4},
        "K (2, 7, 16), V (2, 7, 16) with 4 and 4 heads",
    ),
    "mask": ((Q4, K4, K4), {"attn_mask": torch.zeros(5, 6)}, "attn_mask must broadcast to (2, 4, 5, 7), got (5, 6)"),
    "mask_dimensions": ((Q4, K4, K4), {"attn_mask": torch.zeros(1, 1, 1, 5, 7)}, "attn_mask must broadcast to"),
    "num_samples": ((Q4, K4, K4), {"num_samples": [1, 2]}, "num_samples must hold 1 number or 4, one per query head, got 2"),
}


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", OPERATOR)
def test_operator(name, grad, backend):
    shapes, more, words = OPERATOR[name]
    tensors = [rows(*shape).requires_grad_(grad) for shape in shapes]
    with pytest.raises(ValueError, match=re.escape(words)):
        quantum_attention(*tensors, **more, backend=backend)


def test_operator_types_and_attributes():
    q = rows(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"must share one float type, got torch.float32, torch.float64"):
        quantum_attention(q, q.double(), q)
    with pytest.raises(ValueError, match=r"must share one float type, got torch.int64"):
        quantum_attention(*[q.long()] * 3)
    with pytest.raises(ValueError, match=r"must be on one device, got cpu, meta, cpu$"):
        quantum_attention(q, q.to("meta"), q)
    with pytest.raises(ValueError, match=r"must be on one device, got cpu, cpu, cpu, meta$"):
        quantum_attention(q, q, q, attn_mask=torch.ones(3, 3, dtype=torch.bool, device="meta"))
    with pytest.raises(UsageError, match=r"backend must be one of auto, .*kernel.*, got 'gpu'"):
        quantum_attention(q, q, q, backend="gpu")
    with pytest.raises(UsageError, match="has no attribute 'samples'"):
        quantum_attention(q, q, q, samples=3)
    with pytest.raises(UsageError, match=r"strategy must be one of exact, .* got 'best'"):
        quantum_attention(q, q, q, strategy="best")
    with pytest.raises(UsageError, match=r"^\[QuantumAttention\] num_samples needs strategy .*, got exact; leave"):
        quantum_attention(q, q, q, strategy="exact", num_samples=4)


def test_heads_inherit_what_their_strategies_read():
    heads = [{"quantum_backend": "exact"}] * 2 + [{}] * 2
    groups = QuantumMultiheadAttention(WIDTH, HEADS, num_samples=4, control_variate=False, heads=heads).head_groups
    assert [(a["strategy"], a["num_samples"]) for a, _ in groups] == [("exact", [4] * 2), ("adaptive", [4] * 2)]


def test_there_is_no_second_derivative():
    q = rows(1, 2, 3, 4).requires_grad_()
    y = quantum_attention(q, q, q)
    (first,) = torch.autograd.grad(y.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="quantum_attention_backward"):
        first.sum().backward()


DEVICE = '''
import torch
CALLS = []

def attention(call):
    """A device that computes what qexport's reference does, and counts."""
    from qexport.nn.backends import reference

    CALLS.append(call)
    return reference(call)
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with backends `test_device` and two that cannot be loaded, as pip would install it."""
    (tmp_path / "qexport_test_device.py").write_text(DEVICE)
    info = tmp_path / "qexport_test_device-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qexport-test-device\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[qexport.backends]\ntest_device = qexport_test_device:attention\n"
        "test_missing = qexport_no_such_module:attention\ntest_typo = qexport_test_device:attend\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "qexport_test_device", raising=False)  # of the test before
    yield __import__("qexport_test_device")
    from qexport.nn.backends import get_backend

    get_backend.cache_clear()


def test_an_installed_backend(installed):
    from qexport.nn import backend_names

    assert {"kernel", "reference", "test_device", "test_missing", "test_typo"} <= set(backend_names())
    settings = {"num_samples": 2, "batch_first": True, "seed": 7}
    torch.manual_seed(0)
    device = QuantumMultiheadAttention(WIDTH, HEADS, backend="test_device", **settings).eval()
    torch.manual_seed(0)
    ours = QuantumMultiheadAttention(WIDTH, HEADS, backend="reference", **settings).eval()
    x = rows(2, 9, WIDTH)
    with torch.no_grad():
        assert torch.equal(device(x, x, x)[0], ours(x, x, x)[0])
    assert len(installed.CALLS) == 1
    seen = installed.CALLS[0]
    assert (seen.seed, seen.need_weights, seen.dropout_p) == (7, True, 0.0)
    assert seen.attributes["strategy"] == "adaptive"
    for module in (device, ours):
        module(x, x, x)[0].square().sum().backward()
    assert len(installed.CALLS) == 2, "the gradient is that of the reference, at the same seed"
    for a, b in zip(device.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.usefixtures("installed")
def test_backends_that_cannot_be_loaded():
    words = r"backend 'test_missing' \(qexport_no_such_module:attention\) cannot be loaded: No module named"
    with pytest.raises(QexportError, match=words):
        QuantumMultiheadAttention(WIDTH, HEADS, backend="test_missing")
    q = rows(1, 2, 3, 4)
    with pytest.raises(QexportError, match=r"backend 'test_typo' \(qexport_test_device:attend\) cannot be loaded"):
        quantum_attention(q, q, q, backend="test_typo")
