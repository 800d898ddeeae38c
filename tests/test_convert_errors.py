"""Whatever is wrong with the input: one line that names it, nothing written."""

import json
import os

import numpy as np
import onnx
import pytest
from bundle_factory import make_bundle
from decomposed import encoder, save
from onnx import helper, numpy_helper, parser

from qexport.conversion import convert
from qexport.errors import QexportError, UsageError
from qexport.rewrite import fuse_attention

TINY = '<ir_version: 8, opset_import: ["": 17]> g (float[b,4] x) => (float[b,4] y) { y = Relu(x) }'


def assert_fails(model, folder, *words, kind=QexportError, **arguments):
    """convert raises `kind` with one line that holds the words, and leaves nothing in the folder."""
    target = folder / "out" / "bundle"
    with pytest.raises(kind) as caught:
        convert(model, target, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message
    assert not (folder / "out").exists()


@pytest.fixture
def write(tmp_path):
    def make(model, name="m.onnx"):
        path = tmp_path / name
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return path

    return make


@pytest.mark.parametrize("name", ["missing.onnx", "missing.pt2", "missing", "some/folder"])
def test_missing_path(tmp_path, name):
    assert_fails(tmp_path / name, tmp_path, name, "no such")


def test_a_name_of_the_hub_and_a_module(tmp_path):
    assert_fails("acme/model-v2", tmp_path, "hf download acme/model-v2 --local-dir FOLDER")
    assert_fails(object(), tmp_path, "got object", "package.module:function", kind=UsageError)


def test_a_bundle_is_no_source(tmp_path):
    bundle = make_bundle(tmp_path / "my bundle")
    mend = f"'qexport tune '{bundle}''"
    assert_fails(bundle, tmp_path, "a bundle, which is converted already", mend)


def test_a_deployment_is_not_called_a_bundle(tmp_path):
    (tmp_path / "packed").mkdir()
    manifest = {"schema_version": 1, "kind": "deployment"}
    (tmp_path / "packed" / "manifest.json").write_text(json.dumps(manifest))
    assert_fails(tmp_path / "packed", tmp_path, "no config.json; give a Hugging Face folder")


def test_unknown_kind_of_file(write, tmp_path):
    assert_fails(write(b"x", "model.h5"), tmp_path, "model.h5", ".onnx")


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x00" * 100, json.dumps({"a": 1}).encode()])
def test_not_an_onnx_file(write, tmp_path, content):
    assert_fails(write(content), tmp_path, "m.onnx", "not an ONNX model")


def _ends(kind: str) -> onnx.ModelProto:
    """The encoder with an input or output of an odd kind, or with a sparse weight."""
    model = encoder()
    strings = helper.make_tensor_value_info("words_in", onnx.TensorProto.STRING, ["batch"])
    if kind == "input of strings":
        model.graph.input.append(strings)
    elif kind == "output of strings":
        model.graph.output.append(strings)
    elif kind == "sequence":
        item = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
        model.graph.output.append(helper.make_value_info("parts", helper.make_sequence_type_proto(item)))
        model.graph.node.append(helper.make_node("SequenceConstruct", ["hidden"], ["parts"], name="p"))
    elif kind == "no shape":
        model.graph.input[0].type.tensor_type.ClearField("shape")
    else:
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == "wq0")
        values, places = numpy_helper.from_array(np.ones(1, np.float32), "wq0"), numpy_helper.from_array(np.array([3]), "at")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, list(weight.dims)))
        model.graph.initializer.remove(weight)
    return model


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("input of strings", "input 'words_in' is a tensor of strings"),
        ("output of strings", "output 'words_in' is a tensor of strings"),
        ("sequence", "output 'parts' is a sequence"),
        ("no shape", "input 'input_ids' has no shape"),
        ("sparse", "weight 'wq0' is stored sparse"),
    ],
)
def test_what_is_no_dense_tensor_of_numbers(write, tmp_path, kind, words):
    assert_fails(write(_ends(kind)), tmp_path, "m.onnx", words)


@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
def test_a_truncated_file(write, tmp_path, part):
    whole = encoder().SerializeToString()
    assert_fails(write(whole[: int(len(whole) * part)]), tmp_path, "m.onnx")


def test_no_attention(write, tmp_path):
    assert_fails(write(parser.parse_model(TINY)), tmp_path, "no attention found", "looked for")


def test_only_attention_that_is_declined(write, tmp_path):
    path = save(tmp_path, layers=1, extra="kept = ReduceMean(p0)", outputs=", float[1,1,1,1] kept")
    assert_fails(path, tmp_path, "none of its 1 attentions", "also used by ReduceMean")


def test_an_op_that_nothing_runs(tmp_path, write):
    text = TINY.replace('"": 17', '"": 17, "acme": 1').replace("Relu(x)", "acme.Warp(x)")
    assert_fails(write(parser.parse_model(text)), tmp_path, "acme:Warp", "no function in the file")


def test_an_op_that_onnx_does_not_have(tmp_path, write):
    assert_fails(write(parser.parse_model(TINY.replace("Relu", "Wobble"))), tmp_path, "opset 17 has no op Wobble")


def test_a_converted_model(tmp_path):
    convert(save(tmp_path), tmp_path / "b")
    assert_fails(tmp_path / "b" / "model.onnx", tmp_path, "holds QuantumAttention already", "classical")


def test_an_old_opset(tmp_path, write):
    model = parser.parse_model(TINY.replace('"": 17', '"": 9'))
    assert_fails(write(model), tmp_path, "opset 9", "11")


def test_an_opset_of_the_future(tmp_path, write):
    model = parser.parse_model(TINY)
    model.opset_import[0].version = 99
    assert_fails(write(model), tmp_path, "opset 99", "pip install -U onnx")


def test_a_missing_weight(tmp_path, write):
    model = encoder()
    name = model.graph.initializer.pop().name
    assert_fails(write(model), tmp_path, name)


def external(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save(encoder(), folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64)
    return folder


def test_missing_external_data(tmp_path):
    folder = external(tmp_path)
    (folder / "weights.bin").unlink()
    assert_fails(folder / "m.onnx", tmp_path, "weights.bin", "missing")


def test_short_external_data(tmp_path):
    folder = external(tmp_path)
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(data[: len(data) // 2])
    assert_fails(folder / "m.onnx", tmp_path, "weights.bin", "bytes")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_external_data_outside_the_folder(tmp_path, location):
    folder = external(tmp_path)
    os.rename(folder / "weights.bin", tmp_path / "weights.bin")
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    assert_fails(folder / "m.onnx", tmp_path, location, "outside the folder")


def test_an_input_whose_range_nothing_tells(tmp_path, write):
    """Integers that pick from no table cannot be made up."""
    model = encoder()
    cast = helper.make_node("Cast", ["level"], ["level_f"], to=1, name="c")
    model.graph.node.insert(0, cast)
    model.graph.node.append(helper.make_node("Mul", ["hidden", "level_f"], ["scaled"], name="s"))
    model.graph.input.append(helper.make_tensor_value_info("level", onnx.TensorProto.INT64, [1]))
    model.graph.output.append(helper.make_tensor_value_info("scaled", onnx.TensorProto.FLOAT, None))
    assert_fails(write(model), tmp_path, "'level'", "no table")


def test_an_integer_input_of_an_attention_that_is_left_alone(tmp_path, write):
    text = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[b,l,32] q, float[b,l,16] k, float[b,l,16] v, int32[b] seqlens_k, int32 total) => (float[b,l,32] y) {
        y = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, , , seqlens_k, total)
    }"""
    assert_fails(write(parser.parse_model(text)), tmp_path, "'seqlens_k' goes to GroupQueryAttention", "--kv-cache")


def test_output_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UsageError, match="taken: a file is there already"):
        convert(save(tmp_path), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_holds_other_files(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        convert(save(tmp_path), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_huge_number_in_a_name_is_no_path(tmp_path):
    assert_fails("a" * 5000, tmp_path, kind=QexportError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_samples": 0}, ["num_samples", "0"]),
        ({"num_samples": [1, 2, 3]}, ["3 numbers", "2 query heads"]),
        ({"strategy": "best"}, ["strategy", "best", "stratified"]),
        ({"opset": 16}, ["opset", "17", "16"]),
        ({"dtype": "float64"}, ["dtype", "float64", "bfloat16"]),
        ({"dtype": "float16"}, ["dtype", "torch"]),
        ({"task": "causal-lm"}, ["task", "Hugging Face"]),
        ({"recipe": {"layers": [{"match": "nothing", "strategy": "exact"}]}}, ["layers[0].match", "nothing"]),
    ],
)
def test_wrong_arguments(tmp_path, arguments, words):
    assert_fails(save(tmp_path), tmp_path, *words, kind=UsageError, **arguments)


def test_a_rule_that_trips(tmp_path, monkeypatch):
    def trip(softmax):
        raise KeyError("axis of a kind\nnever seen")

    monkeypatch.setattr(fuse_attention, "find_values", trip)
    assert_fails(save(tmp_path), tmp_path, "to_classical failed (KeyError")


def test_nan_weights_are_told(tmp_path, write):
    model = encoder()
    words = next(i for i in model.graph.initializer if i.name == "words")
    array = onnx.numpy_helper.to_array(words).copy()
    array[:] = np.nan
    words.CopyFrom(onnx.numpy_helper.from_array(array, "words"))
    assert_fails(write(model), tmp_path, "NaN")
