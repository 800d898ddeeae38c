"""sample_attention: attributes, optional inputs and outputs, subgraphs, and the fallback function."""

import numpy as np
import onnx
import pytest
from harness import Rewritten, assert_same, feeds, parse, run

from qexport.ops import QUANTUM_ATTENTION
from qexport.recipe import Recipe

HEAD = '<ir_version: 10, opset_import: ["": 23]> g '
FOUR = "float[b,4,l,8] q, float[b,4,s,8] k, float[b,4,s,8] v"


def quantum_nodes(model):
    graphs, found = [model.graph], []
    while graphs:
        for node in graphs.pop().node:
            graphs.extend(a.g for a in node.attribute if a.HasField("g"))
            if node.op_type == "QuantumAttention":
                found.append(node)
    return found


def attributes_of(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_every_attribute_is_written_out_and_carried_over():
    source = parse(
        f"{HEAD} ({FOUR}) => (float[b,4,l,8] y) {{ y = Attention<scale=0.3, is_causal=1, softcap=2.0>(q, k, v) }}"
    )
    done = Rewritten(source, recipe=Recipe(strategy="hybrid", num_samples=(1, 2, 3, 4), control_variate=0))
    node = quantum_nodes(done.sampled)[0]
    values = attributes_of(node)
    for attr in QUANTUM_ATTENTION.attributes:
        assert attr.name in values or attr.default is None
    assert values["scale"] == pytest.approx(0.3)
    assert (values["is_causal"], values["softcap"], values["strategy"]) == (1, 2.0, b"hybrid")
    assert values["num_samples"] == [1, 2, 3, 4]
    assert values["control_variate"] == 0
    assert list(node.input) == ["q", "k", "v", "", "", "", "", "seed"]


def test_three_axes_and_heads():
    text = "(float[b,l,32] q, float[b,s,16] k, float[b,s,16] v) => (float[b,l,32] y)"
    source = parse(f"{HEAD} {text} {{ y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) }}")
    inputs = feeds(source)
    done = Rewritten(source)
    site = done.sites[0]
    assert (site.q_heads, site.kv_heads, site.head_size) == (4, 2, 8)
    assert_same(run(source, inputs), run(done.sampled, inputs))


def test_past_and_present_of_one_site_beside_a_plain_one():
    text = f"({FOUR}, float[b,4,t,8] pk, float[b,4,t,8] pv) => (float[b,4,l,8] y, float[b,4,u,8] nk, float[b,4,u,8] nv)"
    nodes = "x, nk, nv = Attention(q, k, v, , pk, pv) y = Attention(x, k, v)"
    source = parse(f"{HEAD} {text} {{ {nodes} }}")
    inputs = feeds(source)
    done = Rewritten(source)
    assert [s.layer for s in done.sites] == [0, 1]
    assert len(done.sampled.functions[0].output) == 3
    assert_same(run(source, inputs), run(done.sampled, inputs))


def test_sites_in_both_branches_of_an_if():
    body = "kt = Transpose<perm=[0,1,3,2]>(k) s{n} = MatMul(q, kt) p{n} = Softmax<axis=-1>(s{n}) y{n} = MatMul(p{n}, v)"
    branches = ", ".join(
        f"{which}_branch = g{n} () => (float[b,4,l,8] y{n}) {{ {body.format(n=n)} }}"
        for n, which in ((1, "then"), (2, "else"))
    )
    nodes = f"y0 = If (flag) <{branches}> y = Neg(y0)"
    source = parse(f'<ir_version: 8, opset_import: ["": 17]> g ({FOUR}, bool flag) => (float[b,4,l,8] y) {{ {nodes} }}')
    inputs = {name: array for name, array in feeds(source).items() if name != "flag"}
    for opset in (17, 23):
        done = Rewritten(source, opset=opset)
        assert done.left_alone == []
        assert len(quantum_nodes(done.sampled)) == 2
        for flag in (True, False):
            chosen = inputs | {"flag": np.array(flag)}
            assert_same(run(source, chosen), run(done.sampled, chosen))


def test_double_precision_declines():
    text = f"({FOUR}) => (float[b,4,l,8] y)".replace("float", "double")
    done = Rewritten(parse(f"{HEAD} {text} {{ y = Attention(q, k, v) }}"))
    assert done.sites == []
    assert "double" in done.left_alone[0].reason
    assert done.sampled.functions == []


@pytest.mark.parametrize(
    "mask", ["bool[b,1,1,s] m", "float[1,s] m", "float[4,1,s] m", "bool[b,4,l,s] m", "float[b,1,l,s] m"]
)
def test_masks_get_the_query_axis_that_runtimes_want(mask):
    source = parse(f"{HEAD} ({FOUR}, {mask}) => (float[b,4,l,8] y) {{ y = Attention(q, k, v, m) }}")
    inputs = feeds(source)
    done = Rewritten(source)
    full = dict(inputs)
    full["m"] = np.broadcast_to(inputs["m"], np.broadcast_shapes(inputs["m"].shape, (1, 1, 5, 7))).copy()
    expected = run(source_without_shape(source), full)
    assert_same(expected, run(done.classical, inputs))
    assert_same(expected, run(done.sampled, inputs))
    assert done.ops().count("Expand") == (0 if ",l,s]" in mask else 1)


def source_without_shape(model):
    """The model with a mask of any shape, to feed the broadcast one as the expected result."""
    free = onnx.ModelProto()
    free.CopyFrom(model)
    next(i for i in free.graph.input if i.name == "m").type.tensor_type.ClearField("shape")
    return free


def test_a_mask_shared_by_layers_is_expanded_once():
    nodes = "x = Attention(q, k, v, m) y = Attention(x, k, v, m)"
    source = parse(f"{HEAD} ({FOUR}, bool[b,1,1,s] m) => (float[b,4,l,8] y) {{ {nodes} }}")
    assert Rewritten(source).ops().count("Expand") == 1
