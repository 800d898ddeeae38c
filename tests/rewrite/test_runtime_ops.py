"""fuse_multi_head_attention and fuse_packed_attention: com.microsoft's ops become Attention, or say why not."""

import numpy as np
import onnx
import pytest
from harness import Rewritten, assert_same, parse, run

HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g '
FLAT = "float[b,l,32] q, float[b,s,32] k, float[b,s,32] v"
OUT = "float[b,l,32] y"

MULTI_HEAD = {
    "plain": (FLAT, "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v)", OUT),
    "scale": (FLAT, "y = com.microsoft.MultiHeadAttention<num_heads=4, scale=0.2>(q, k, v)", OUT),
    "bias": (FLAT + ", float[96] b3", "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, b3)", OUT),
    "padding": (
        FLAT + ", int32[b,s] pad",
        "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , pad)",
        OUT,
    ),
    "lengths": (FLAT + ", int32[b] len", "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , len)", OUT),
    "attention bias": (
        FLAT + ", float[b,4,l,s] bias",
        "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , , bias)",
        OUT,
    ),
    "padding and attention bias": (
        FLAT + ", int32[b,s] pad, float[1,4,l,s] bias",
        "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , pad, bias)",
        OUT,
    ),
    "keys with heads": (
        "float[b,l,32] q, float[b,4,s,8] k, float[b,4,s,8] v",
        "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v)",
        OUT,
    ),
}
PAST = (
    FLAT + ", float[b,4,t,8] pk, float[b,4,t,8] pv",
    "y, nk, nv = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , , , pk, pv)",
    OUT + ", float[b,4,u,8] nk, float[b,4,u,8] nv",
)
CAUSAL = (
    "float[b,l,32] q, float[b,l,32] k, float[b,l,32] v",
    "y = com.microsoft.MultiHeadAttention<num_heads=4, unidirectional=1>(q, k, v)",
    OUT,
)

PACKED = {
    "plain": ("float[b,l,16] x, float[16,96] w, float[96] b3", "y = com.microsoft.Attention<num_heads=4>(x, w, b3)", OUT),
    "padding": (
        "float[b,l,16] x, float[16,96] w, float[96] b3, int32[b,l] pad",
        "y = com.microsoft.Attention<num_heads=4>(x, w, b3, pad)",
        OUT,
    ),
    "own widths": (
        "float[b,l,16] x, float[16,112] w, float[112] b3",
        "y = com.microsoft.Attention<num_heads=4, qkv_hidden_sizes=[32, 32, 48]>(x, w, b3)",
        "float[b,l,48] y",
    ),
}


def build(case):
    inputs, nodes, outputs = case
    return parse(f"{HEAD} ({inputs}) => ({outputs}) {{ {nodes} }}")


def feeds(model):
    rng = np.random.default_rng(1)
    sizes = {"b": 2, "l": 5, "s": 7, "t": 3}
    made = {}
    for value in model.graph.input:
        shape = tuple(d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim)
        if value.name == "pad":
            made["pad"] = (np.arange(shape[1]) < np.array([[shape[1]], [shape[1] - 2]])).astype(np.int32)
        elif value.name == "len":
            made["len"] = np.array([7, 4], np.int32)
        else:
            made[value.name] = rng.standard_normal(shape).astype(np.float32) / 2
    return made


def check(case, opset=23):
    source = build(case)
    inputs = feeds(source)
    done = Rewritten(source, opset=opset)
    assert done.left_alone == []
    assert len(done.sites) == 1
    assert not any(node.domain == "com.microsoft" for node in done.sampled.graph.node)
    expected = run(source, inputs)
    assert_same(expected, run(done.sampled, inputs))
    if opset >= 23:
        onnx.checker.check_model(done.classical, full_check=True)
        assert_same(expected, run(done.classical, inputs))
    return done


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention(name, opset):
    check(MULTI_HEAD[name], opset)


def test_scores_that_are_an_output_of_the_graph_are_left_alone():
    source = build((FLAT, "y, , , qk = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v)", OUT + ", float[b,4,l,s] qk"))
    done = Rewritten(source)
    assert done.sites == []
    assert [entry.reason for entry in done.left_alone] == ["its scores are an output that is used"]
    assert_same(run(source, feeds(source)), run(done.sampled, feeds(source)))


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("name", PACKED)
def test_packed_attention(name, opset):
    check(PACKED[name], opset)


def test_past_keys_and_causal():
    check(PAST)
    done = check(CAUSAL)
    node = next(n for n in done.classical.graph.node if n.op_type == "Attention")
    assert next(a.i for a in node.attribute if a.name == "is_causal") == 1


@pytest.mark.parametrize(("case", "reason"), [(PAST, "past keys"), (CAUSAL, "causal")])
def test_declines_below_opset_23(case, reason):
    done = Rewritten(build(case), opset=17)
    assert done.sites == []
    assert reason in done.left_alone[0].reason


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y, s0 = com.microsoft.Attention<num_heads=4>(x, w, b3, , past)", "packed in one tensor"),
        ("y = com.microsoft.Attention<num_heads=4, do_rotary=1>(x, w, b3)", "rotary"),
        ("y = com.microsoft.PackedAttention<num_heads=4>(x, w, b3, order, counts)", "packed without padding"),
    ],
)
def test_declines_with_the_reason(nodes, reason):
    inputs = "float[b,l,16] x, float[16,96] w, float[96] b3, float[2,b,4,t,8] past, int32[b,l] order, int32[n] counts"
    done = Rewritten(build((inputs, nodes, OUT)))
    assert done.sites == []
    assert reason in done.left_alone[0].reason
    assert any(node.domain == "com.microsoft" for node in done.sampled.graph.node)
