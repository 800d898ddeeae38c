"""inspect: what it says of a bundle and of bare files is what is in them."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from bundle_factory import HEADS, WIDTH, build_model, make_bundle
from onnx import TensorProto, helper, numpy_helper

from qexport.errors import QexportError
from qexport.inspection import inspect, oldest_runtime
from qexport.ops import QUANTUM_ATTENTION


@pytest.fixture
def folder(tmp_path):
    return make_bundle(tmp_path / "bundle", attention={"num_samples": [3, 5]})


def test_a_bundle(folder):
    found = inspect(folder)
    json.dumps(found, allow_nan=False)
    assert found["kind"] == "bundle"
    assert found["opsets"] == {"ai.onnx": 23, "com.qexport": 1}
    assert found["ir_version"] == 10
    assert found["min_onnxruntime"] == "1.23"
    assert found["ops"]["com.qexport:QuantumAttention"] == 2
    assert found["nodes"] == sum(found["ops"].values()) == len(onnx.load(folder / "model.onnx").graph.node)
    assert found["functions"] == ["com.qexport:QuantumAttention"]
    assert found["fallbacks"] == {"com.qexport:QuantumAttention": QUANTUM_ATTENTION.fallback}
    assert [site["module"] for site in found["attention"]] == ["encoder.0.attention", "encoder.1.attention"]
    assert found["attention"][1]["attributes"]["num_samples"] == [3, 5]
    assert found["attention"][1]["attributes"]["strategy"] == "stratified"
    assert found["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"], "optional": False}
    assert found["inputs"][2] == {"name": "seed", "dtype": "int64", "shape": [], "optional": True}
    assert found["outputs"][0]["shape"] == ["batch", "sequence", HEADS * 8]
    assert found["sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert found["file_bytes"] == (folder / "model.onnx").stat().st_size
    assert found["limits"] == {"sequence": 64}
    assert found["changed_files"] == []


def test_parameters_are_counted(folder):
    model = onnx.load(folder / "model.onnx")
    arrays = [numpy_helper.to_array(t) for t in model.graph.initializer]
    found = inspect(folder)
    assert found["parameters"] == sum(a.size for a in arrays)
    assert found["parameter_bytes"] == sum(a.nbytes for a in arrays)


def test_a_changed_bundle_says_so(folder):
    with open(folder / "classical.onnx", "ab") as file:
        file.write(b"\0")
    assert inspect(folder)["changed_files"] == ["classical.onnx"]


def test_a_bare_file_with_external_data(tmp_path):
    model = build_model(quantum=False)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    found = inspect(tmp_path / "m.onnx")
    assert found["kind"] == "model"
    assert found["recipe"] is None
    assert found["external_files"] == ["m.data"]
    assert found["file_bytes"] == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.data"))
    assert [site["op"] for site in found["attention"]] == ["Attention", "Attention"]
    assert found["parameters"] > 12 * WIDTH * WIDTH
    (tmp_path / "m.data").unlink()
    with pytest.raises(QexportError, match=r"external data .m\.data. of .* is missing"):
        inspect(tmp_path / "m.onnx")


def test_subgraphs_are_looked_into(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("Attention", ["q", "q", "q"], ["out"], name="inside")],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    inputs = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("q", TensorProto.FLOAT, [1, 2, 3, 4]),
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "m.onnx")
    found = inspect(tmp_path / "m.onnx")
    assert found["ops"] == {"Attention": 2, "If": 1}
    assert [site["name"] for site in found["attention"]] == ["inside", "inside"]


def test_four_bit_weights(tmp_path):
    weight = helper.make_tensor("w", TensorProto.INT4, [5], np.array([1, 2, 3, 4, 5]))
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.INT4, [5])],
        [weight],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    found = inspect(tmp_path / "m.onnx")
    assert (found["parameters"], found["parameter_bytes"]) == (5, 3)


def test_the_oldest_runtime():
    assert oldest_runtime(17, 8) == "1.13"
    assert oldest_runtime(11, 6) == "1.13"
    assert oldest_runtime(17, 10) == "1.18"
    assert oldest_runtime(23, 10) == "1.23"
    assert oldest_runtime(99, 10) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.onnx", None, "no such file or folder"),
        ("text.onnx", b"hello, this is no protobuf at all", "not an ONNX model"),
        ("empty.onnx", b"", "not an ONNX model"),
        ("manifest.json", b'{"schema_version": 1}', "not an ONNX model"),
    ],
)
def test_what_is_no_model(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(QexportError) as error:
        inspect(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(QexportError, match="not a bundle"):
        inspect(tmp_path)


def test_inputs_of_all_layers_stand_once(qexport, tmp_path):
    names = ["past.0.key", "past.0.value", "past.1.key", "past.1.value", "past.2.key", "past.3.value", "x"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, "n"]) for name in names]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Sum", names, ["y"])], "g", values, [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    _, out, _ = qexport("inspect", tmp_path / "m.onnx")
    assert "inputs    past.0..2.key float[2, n], past.0,1,3.value float[2, n], x float[2, n]\n" in out
