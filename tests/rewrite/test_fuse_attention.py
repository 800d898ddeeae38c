"""fuse_attention fires on every spelling, declines with its reason, and stays equal."""

import axes_spellings
import declined_spellings
import hand_spellings
import onnx
import pytest
import rare_spellings
import sink_spellings
import spellings
from harness import Rewritten, assert_same, feeds, parse, run

FUSED, DECLINED = {}, {}
for spelled in (axes_spellings, declined_spellings, hand_spellings, rare_spellings, sink_spellings, spellings):
    FUSED |= getattr(spelled, "FUSED", {})
    DECLINED |= getattr(spelled, "DECLINED", {})


@pytest.mark.parametrize("name", FUSED)
def test_fires_and_stays_equal(name):
    spelling = FUSED[name]
    source = parse(spelling.text)
    inputs = feeds(source)
    done = Rewritten(source)
    assert [entry.reason for entry in done.left_alone] == []
    assert done.ops().count("Attention") == spelling.sites
    assert done.ops("sampled").count("QuantumAttention") == len(done.sites) == spelling.sites
    onnx.checker.check_model(done.classical, full_check=True)
    expected = run(source, inputs)
    assert_same(expected, run(done.classical, inputs))
    for library in (False, True):  # fewer keys than num_samples: exact
        assert_same(expected, run(done.sampled, inputs, library))


@pytest.mark.parametrize("name", [name for name, spelling in FUSED.items() if spelling.opset <= 17])
def test_low_opset_stays_equal(name):
    spelling = FUSED[name]
    source = parse(spelling.text)
    inputs = feeds(source)
    done = Rewritten(source, opset=17)
    assert done.left_alone == []
    assert "Attention" not in done.ops() + done.ops("sampled")
    assert done.ops("sampled").count("QuantumAttention") == spelling.sites
    assert_same(run(source, inputs), run(done.sampled, inputs))


@pytest.mark.parametrize("name", DECLINED)
def test_declines_with_the_reason(name):
    spelling, reason = DECLINED[name]
    source = parse(spelling.text)
    inputs = feeds(source)
    done = Rewritten(source)
    assert done.sites == []
    assert len(done.left_alone) == 1
    assert reason in done.left_alone[0].reason
    assert done.left_alone[0].name == "/block/attention/Attention_" + done.left_alone[0].name.rpartition("_")[2]
    assert done.left_alone[0].module == "block.attention"
    assert_same(run(source, inputs), run(done.sampled, inputs))


def test_a_reason_names_a_nameless_node_by_its_output():
    source = parse(DECLINED["keys whose weight is dropped"][0].text)
    for node in source.graph.node:
        node.name = ""
    done = Rewritten(source)
    assert "pass Slice 'p'" in done.left_alone[0].reason


def test_soft_cap_declines_below_opset_23():
    source = parse(FUSED["soft cap"].text.replace('"": 23', '"": 17'))
    done = Rewritten(source, opset=17)
    assert "soft cap" in done.left_alone[0].reason


def test_scale_folds_into_one_number():
    done = Rewritten(parse(FUSED["scale on q and k"].text))
    node = next(n for n in done.classical.graph.node if n.op_type == "Attention")
    scale = next(a.f for a in node.attribute if a.name == "scale")
    assert scale == pytest.approx(0.594604**2)
    assert list(node.input[:3]) == ["q", "k", "v"]


def test_scale_of_the_shape_is_computed():
    done = Rewritten(parse(FUSED["scale of the shape"].text))
    node = next(n for n in done.classical.graph.node if n.op_type == "Attention")
    assert next(a.f for a in node.attribute if a.name == "scale") == pytest.approx(8**-0.5)


def test_keys_are_read_as_they_were_before_three_axes():
    done = Rewritten(parse(FUSED["keys transposed by way of three axes"].text))
    attention = next(node for node in done.classical.graph.node if node.op_type == "Attention")
    assert list(attention.input) == ["q", "k", "v"]


@pytest.mark.parametrize("name", [name for name in FUSED if name.startswith("grouped heads, repeated")])
def test_grouped_heads_are_not_repeated(name):
    done = Rewritten(parse(FUSED[name].text))
    assert (done.sites[0].q_heads, done.sites[0].kv_heads, done.sites[0].head_size) == (4, 2, 8)
    assert not {"Expand", "Tile"} & set(done.ops())


def test_a_sink_lets_groups_share_a_key_head():
    site = Rewritten(parse(FUSED["a sink and groups of heads"].text)).sites[0]
    assert (site.q_heads, site.kv_heads, site.head_size) == (4, 2, 16)  # one axis for the sink, and up to 8


@pytest.mark.parametrize("name", [name for name in axes_spellings.FUSED if "groups" in name and "open" not in name])
def test_groups_in_an_axis_of_their_own_share_a_key_head(name):
    site = Rewritten(parse(FUSED[name].text)).sites[0]
    assert (site.q_heads, site.kv_heads, site.head_size) == (6, 2, 8)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("joined and split again", 4),
        ("joined heads, their rows left open", 4),
        ("joined heads of two batches, their rows left open", 4),
        ("images joined to pixels", 1),
        ("two views joined to one row", 1),
    ],
)
def test_heads_are_counted_where_they_are_joined_to_the_batch(name, heads):
    site = Rewritten(parse(FUSED[name].text)).sites[0]
    assert (site.q_heads, site.kv_heads) == (heads, heads)


def test_a_short_target_of_expand_tells_no_number_of_heads():
    site = Rewritten(parse(FUSED["queries expanded along their rows"].text)).sites[0]
    assert (site.q_heads, site.kv_heads, site.head_size) == (None, None, 8)


@pytest.mark.parametrize(
    ("name", "heads"), [("one key head for all", (4, 1)), ("groups of heads of an open number", (None, 2))]
)
def test_key_heads_are_not_repeated_for_those_of_the_queries(name, heads):
    site = Rewritten(parse(FUSED[name].text)).sites[0]
    assert (site.q_heads, site.kv_heads) == heads


def test_queries_are_not_repeated_for_a_mask_of_which_nothing_is_known():
    spelling = FUSED["a mask of more batches, and their number open"]
    text = spelling.text.replace("float[b,1,1,s] bias", "float[b,1,1,s] bias0, int64[4] to")
    done = Rewritten(parse(text.replace("s0 =", "bias = Reshape(bias0, to) s0 =")))
    attention = next(node for node in done.classical.graph.node if node.op_type == "Attention")
    assert attention.input[0] == "q"


PADDING = FUSED["padding as a bias"].text.replace("s1 = Add(s0, rel) s2 = Add(s1, bias)", "s2 = Add(s0, bias)")


@pytest.mark.parametrize("text", [FUSED["where keep"].text, PADDING])
def test_masks_become_boolean(text):
    done = Rewritten(parse(text))
    inferred = onnx.shape_inference.infer_shapes(done.classical)
    node = next(n for n in done.classical.graph.node if n.op_type == "Attention")
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    assert types[node.input[3]] == onnx.TensorProto.BOOL


def test_a_classifier_is_no_site():
    text = FUSED["no scale"]
    source = parse(text.text.replace("y = MatMul(p, v)", "y = Identity(p)").replace("float[b,4,l,8] y", "float[b,4,l,s] y"))
    done = Rewritten(source)
    assert done.sites == []
    assert done.left_alone == []
