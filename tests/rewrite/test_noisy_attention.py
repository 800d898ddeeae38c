"""measure_attention: the converted model against the references of its ops, for every form of attention."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from harness import SIZES, Rewritten, assert_same, feeds, lowered, parse, run
from spellings import FUSED

from qexport.errors import UsageError
from qexport.installed import get_library_path
from qexport.noise.model import parse_noise
from qexport.ops.proto import function_proto, register_schemas
from qexport.ops.quantum_measure_ref import quantum_measure_ref
from qexport.ops.quantum_noise_ref import quantum_noise_ref
from qexport.recipe import Recipe
from qexport.rewrite.sample_attention import sample_attention

NOISE = "depolarizing:0.05,amplitude_damping:0.1,readout:0.02"
FOUR = "float[b,4,l,8] q, float[b,4,s,8] k, float[b,4,s,8] v"
GROUPED = "float[b,4,l,8] q, float[b,2,s,8] k, float[b,2,s,6] v"
SPELLED = (
    "kt = Transpose<perm=[0,1,3,2]>(k) s1 = MatMul(q, kt) s2 = Mul(s1, half) s3 = Add(s2, bias) "
    "p = Softmax<axis=-1>(s3) y = MatMul(p, v)"
)
# name: inputs, nodes, output, opset
FORMS = {
    "plain": (FOUR, "y = Attention(q, k, v)", "float[b,4,l,8] y", 23),
    "scale and softcap": (FOUR, "y = Attention<scale=0.7, softcap=1.5>(q, k, v)", "float[b,4,l,8] y", 23),
    "causal": (FOUR, "y = Attention<is_causal=1>(q, k, v)", "float[b,4,l,8] y", 23),
    "boolean mask": (FOUR + ", bool[b,1,l,s] m", "y = Attention(q, k, v, m)", "float[b,4,l,8] y", 23),
    "float mask": (FOUR + ", float[b,4,l,s] m", "y = Attention(q, k, v, m)", "float[b,4,l,8] y", 23),
    "grouped": (GROUPED, "y = Attention(q, k, v)", "float[b,4,l,6] y", 23),
    "three axes": (
        "float[b,l,32] q, float[b,s,32] k, float[b,s,32] v",
        "y = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)",
        "float[b,l,32] y",
        23,
    ),
    "three axes, grouped, causal": (
        "float[b,l,32] q, float[b,s,16] k, float[b,s,16] v",
        "y = Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(q, k, v)",
        "float[b,l,32] y",
        23,
    ),
    "past": (
        FOUR + ", float[b,4,t,8] pk, float[b,4,t,8] pv",
        "y, nk, nv = Attention<is_causal=1>(q, k, v, , pk, pv)",
        "float[b,4,l,8] y, float[b,4,u,8] nk, float[b,4,u,8] nv",
        23,
    ),
    "half precision": (
        FOUR.replace("float", "float16") + ", bool[b,1,l,s] m",
        "y = Attention(q, k, v, m)",
        "float16[b,4,l,8] y",
        23,
    ),
    "MatMul and Softmax": (FOUR + ", float[b,1,1,s] bias", SPELLED, "float[b,4,l,8] y", 17),
    "MatMul and Softmax, at opset 23": (FOUR + ", float[b,1,1,s] bias", SPELLED, "float[b,4,l,8] y", 23),
}


def source_of(form: str) -> tuple[onnx.ModelProto, int]:
    inputs, nodes, output, opset = FORMS[form]
    half = "<float half = {0.5}>" if "half" in nodes else ""
    written = 17 if half else opset
    return parse(f'<ir_version: 8, opset_import: ["": {written}]> g ({inputs}) => ({output}) {half} {{ {nodes} }}'), opset


def inputs_of(form: str, source) -> dict:
    """Random inputs; where there is a mask a query sees nothing, and a float mask hides keys by -inf."""
    given = feeds(source)
    if "m" in given and given["m"].dtype == bool:
        given["m"][0, :, 2] = False
    elif "m" in given:
        given["m"][..., 3] = -np.inf
    return given


def converted(form: str, noise: str, shots, **recipe):
    source, opset = source_of(form)
    done = Rewritten(source, opset=opset, recipe=Recipe(noise=noise, shots=shots, **recipe))
    assert [site.noise for site in done.sites] == [noise], done.left_alone
    return source, done


def with_library(model: onnx.ModelProto, given: dict, watched=()) -> list[np.ndarray]:
    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    watching.graph.output.extend(onnx.ValueInfoProto(name=name) for name in watched)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(get_library_path())
    return onnxruntime.InferenceSession(watching.SerializeToString(), options).run(None, given)


def sees(source, given) -> np.ndarray:
    """Which rows of the output belong to queries that see a key."""
    rows = np.ones(given["q"].shape[-2] if given["q"].ndim == 4 else given["q"].shape[1], bool)
    if given.get("m") is not None and given["m"].dtype == bool:
        rows[2] = False
    return rows


@pytest.mark.parametrize("form", FORMS)
def test_no_noise_and_infinite_shots_are_the_classical_model(form):
    source, done = converted(form, "depolarizing:0,readout:0", "inf")
    given = inputs_of(form, source)
    classical, found = run(source, given), with_library(done.sampled, given)
    assert "QuantumMeasure" not in done.ops("sampled")
    rows = sees(source, given)
    if rows.all():
        tolerance = 1e-5
        for a, b in zip(classical, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
    else:
        tolerance = 2e-3 if classical[0].dtype == np.float16 else 1e-5
        np.testing.assert_allclose(found[0][1], classical[0][1], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(found[0][0][:, rows], classical[0][0][:, rows], rtol=tolerance, atol=tolerance)
        assert not found[0][0][:, ~rows].any()


@pytest.mark.parametrize("form", FORMS)
def test_without_the_library_it_is_the_classical_model(form):
    source, done = converted(form, NOISE, 16)
    given = inputs_of(form, source)
    rows = sees(source, given)
    for a, b in zip(run(source, given), run(done.sampled, given), strict=True):
        if not rows.all():
            a, b = a[..., rows, :], b[..., rows, :]
        tolerance = 2e-3 if a.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_noise_and_measurement_are_those_of_the_references(form):
    source, done = converted(form, NOISE, 16, seed=5)
    given = inputs_of(form, source)
    chain = [node for node in done.sampled.graph.node if node.op_type in ("QuantumNoise", "QuantumMeasure")]
    attention = next(node for node in done.sampled.graph.node if node.op_type == "QuantumAttention")
    watched = [attention.output[3], attention.output[2], chain[-1].input[0], chain[-1].output[0]]
    *_, rows, values, noisy, measured = with_library(done.sampled, given, watched)
    y = with_library(done.sampled, given)[0]

    half = rows.dtype == np.float16
    keys = rows.shape[-1]
    expected = torch.nn.functional.pad(torch.from_numpy(rows), (0, (1 << (keys - 1).bit_length()) - keys))
    for model in parse_noise(NOISE):  # on all states of the register, which only the measurement discards
        expected, _ = quantum_noise_ref(expected, np.float32(model.level), **model.attributes)
    expected = expected.double().numpy()[..., :keys] * (rows > 0)
    expected /= np.where(expected.sum(-1, keepdims=True) > 0, expected.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(noisy, expected, atol=2e-3 if half else 1e-6)
    assert ((rows == 0) <= (noisy == 0)).all()

    drawn = quantum_measure_ref(torch.from_numpy(noisy), 5, shots=16, layer=0).numpy()
    np.testing.assert_array_equal(measured, drawn)
    groups = rows.shape[1] // values.shape[1]
    expected = measured.astype(np.float64) @ np.repeat(values.astype(np.float64), groups, axis=1)
    if y.ndim == 3:
        expected = expected.transpose(0, 2, 1, 3).reshape(y.shape)
    np.testing.assert_allclose(y, expected, atol=2e-2 if half else 1e-5)


@pytest.mark.parametrize(
    ("name", "opset"), [(name, opset) for name, one in FUSED.items() for opset in (17, 23) if opset >= one.opset]
)
def test_every_spelling_can_be_noisy(name, opset):
    source = parse(FUSED[name].text)
    given = feeds(source)
    done = Rewritten(source, opset=opset, recipe=Recipe(noise="bit_flip:0", shots="inf"))
    assert (len(done.sites), done.left_alone) == (FUSED[name].sites, [])
    assert "QuantumNoise" in done.ops("sampled")
    register_schemas()
    onnx.checker.check_model(done.sampled, full_check=True)
    assert_same(run(source, given), with_library(done.sampled, given))


def test_the_scale_multiplies_every_level_and_is_an_input():
    _, done = converted("plain", "depolarizing:0.02,bit_flip:0.01", "inf")
    given = inputs_of("plain", done.sampled) | {"noise_scale": np.array(2, np.float32), "seed": np.array(0)}
    _, twice = converted("plain", "depolarizing:0.04,bit_flip:0.02", "inf")
    plain = {name: array for name, array in given.items() if name in "qkv"}
    assert_same(with_library(twice.sampled, plain), with_library(done.sampled, given))
    none = with_library(done.sampled, given | {"noise_scale": np.array(0, np.float32)})
    assert_same(run(source_of("plain")[0], plain), none)


def test_masked_keys_and_later_tokens_cannot_be_measured():
    """Under noise that is all there is, a row is uniform over the keys that its query sees."""
    source, done = converted("causal", "depolarizing:1", "inf")
    given = feeds(source)
    found = with_library(done.sampled, given)[0]
    for i in range(found.shape[2]):  # query i sees the keys up to i
        np.testing.assert_allclose(found[:, :, i], given["v"][:, :, : i + 1].mean(axis=2), atol=1e-6)


def test_sites_draw_differently():
    text = f"({FOUR}) => (float[b,4,l,8] y, float[b,4,l,8] z)"
    nodes = "y = Attention(q, k, v) z = Attention(q, k, v)"
    source = parse(f'<ir_version: 10, opset_import: ["": 23]> g {text} {{ {nodes} }}')
    done = Rewritten(source, recipe=Recipe(noise="depolarizing:0.01", shots=8))
    y, z = with_library(done.sampled, feeds(source))
    assert np.abs(y - z).max() > 0.1


def test_layers_choose_their_noise():
    text = f"({FOUR}) => (float[b,4,l,8] z)"
    nodes = "x = Attention(q, k, v) y = Attention(x, k, v) z = Attention(y, k, v)"
    source = parse(f'<ir_version: 10, opset_import: ["": 23]> g {text} {{ {nodes} }}')
    layers = [
        {"match": "*_1", "noise": "readout:0.1", "shots": "inf"},
        {"match": "*_2", "strategy": "exact", "precision": "fp32"},
    ]
    done = Rewritten(source, recipe=Recipe(noise="depolarizing:0.01", shots=64, layers=layers))
    assert [(site.noise, site.shots) for site in done.sites] == [
        ("depolarizing:0.01", 64),
        ("readout:0.1", "inf"),
        (None, None),
    ]
    assert [done.ops("sampled").count(op) for op in ("QuantumNoise", "QuantumMeasure")] == [2, 1]
    given = feeds(source)
    assert_same(run(source, given), run(done.sampled, given))


def test_a_single_key_has_no_noise(monkeypatch):
    monkeypatch.setitem(SIZES, "s", 1)
    source, done = converted("grouped", NOISE, 4)
    given = feeds(source)
    assert_same(run(source, given), with_library(done.sampled, given))


def test_what_cannot_be_measured_is_left_alone():
    noisy = Recipe(noise="depolarizing:0.01")
    text = f"({FOUR}) => (float[b,4,l,8] y, float[b,4,l,s] p)"
    source = parse(f'<ir_version: 10, opset_import: ["": 23]> g {text} {{ y, , , p = Attention(q, k, v) }}')
    assert "its scores are used elsewhere" in Rewritten(source, recipe=noisy).left_alone[0].reason
    text = f"({FOUR}, int64[b] len) => (float[b,4,l,8] y)"
    source = parse(f'<ir_version: 10, opset_import: ["": 24]> g {text} {{ y = Attention(q, k, v, , , , len) }}')
    assert "a cache that is appended in place" in Rewritten(source, opset=24, recipe=noisy).left_alone[0].reason


def test_the_fallback_below_opset_23_has_no_summaries():
    with pytest.raises(UsageError, match="4 outputs, got num_outputs 5"):
        function_proto("QuantumAttention", 22, 5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("noise", ["depolarizing:0.1", "amplitude_damping:0.3", "depolarizing:0.2:scope=global"])
def test_inverted_noise_leaves_nothing_but_shots(form, noise):
    source, opset = source_of(form)
    given = inputs_of(form, source)

    def converted(shots):
        recipe, model = Recipe(noise=noise, shots=shots), lowered(source, opset)
        sites, _ = sample_attention(model, recipe, invert=True)
        assert len(sites) == 1
        return with_library(ir.to_proto(model), given)[0]

    rows = sees(source, given)
    plain = Rewritten(source, opset=opset, recipe=Recipe(noise="depolarizing:0", shots="inf"))
    exact = with_library(plain.sampled, given)[0]
    tolerance = 1e-2 if exact.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(converted("inf"), exact, rtol=tolerance, atol=tolerance)
    few, many = (np.abs(converted(shots) - exact)[..., rows, :].mean() for shots in (2**7, 2**15))
    assert 8 < few / many < 32  # 16 in the mean: shots are all that is left
