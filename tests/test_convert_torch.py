"""convert of torch modules and .pt2 archives: dynamic axes, module names, masks, types, and errors in one line."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch_zoo

from qexport.conversion import convert
from qexport.errors import QexportError, UsageError
from qexport.runtime import session
from qexport.sources.torch_export import export_module

ATOL = 1e-5


def torch_outputs(module, inputs):
    with torch.no_grad():
        outputs = module.eval()(**inputs) if isinstance(inputs, dict) else module.eval()(*inputs)
    return [t.numpy() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]


def assert_same_model(folder, module, inputs, library=True):
    """The converted model computes what the module does on these inputs."""
    opened = session(folder / "model.onnx", library=library)
    names = [i.name for i in opened.get_inputs() if i.name != "seed"]
    tensors = inputs.values() if isinstance(inputs, dict) else inputs
    got = opened.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))
    for a, b in zip(torch_outputs(module, inputs), got, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=ATOL * np.abs(a).max())


def larger(inputs):
    """The same inputs with another batch and length."""

    def grow(t):
        return torch.cat([t, t, t.flip(0)])[:5] if t.ndim < 2 else torch.cat([torch.cat([t, t[:, :4]], 1)] * 3)[:5]

    return {k: grow(v) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(grow(v) for v in inputs)


@pytest.mark.parametrize(
    "name", ["encoder", "causal", "masked", "eager", "one_item", "named_axes", "multi_head", "reversed_inputs"]
)
def test_callables(name, tmp_path):
    report = convert(f"torch_zoo:{name}", tmp_path / "b", strategy="stratified", num_samples=64)
    module, inputs = getattr(torch_zoo, name)()[:2]
    assert report.left_alone == []
    assert report.notes == []
    assert len(report.sites) == (1 if name == "multi_head" else 2)
    for site in report.sites:
        assert (site["q_heads"], site["kv_heads"], site["head_size"]) == (4, 4, 8)
    assert_same_model(tmp_path / "b", module, inputs)
    assert_same_model(tmp_path / "b", module, larger(inputs))
    assert_same_model(tmp_path / "b", module, larger(inputs), library=False)


class Twice(torch.nn.Module):
    def forward(self, x):
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return y, y, x + 1


def test_an_output_that_is_returned_twice_keeps_both_names():
    names = ["first", "again", "other"]
    source = export_module(Twice(), (torch.randn(2, 1, 3, 4),), {}, kind="torch", name="t", opset=23, output_names=names)
    assert [value.name for value in source.model.graph.outputs] == list(source.expected) == names


class Checked(torch.nn.Module):
    def forward(self, x):
        torch._check_tensor_all(x.abs() < 1e6)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_a_check_of_values_leaves_the_graph():
    source = export_module(Checked(), (torch.randn(2, 1, 3, 4),), {}, kind="torch", name="t", opset=23)
    assert [node.op_type for node in source.model.graph] == ["Attention"]


def test_an_input_that_the_module_ignores_stays_an_input(tmp_path):
    report = convert("torch_zoo:unused_input", tmp_path / "b", strategy="stratified", num_samples=64)
    assert [i["name"] for i in report.manifest["inputs"]] == ["x", "extra"]
    module, inputs = torch_zoo.unused_input()
    assert_same_model(tmp_path / "b", module, inputs)


def test_module_names_axes_and_bounds(tmp_path):
    report = convert("torch_zoo:named_axes", tmp_path / "b")
    assert [s["module"] for s in report.sites] == ["layers.0", "layers.1"]
    assert report.manifest["source"] == {"kind": "callable", "name": "torch_zoo:named_axes", "task": None, "dtype": None}
    assert report.manifest["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["items", "tokens"], "kind": "token_ids", "high": torch_zoo.VOCAB}
    ]
    assert report.manifest["limits"] == {"tokens": 64}


def test_no_path_of_this_machine_is_left_in_the_file(tmp_path):
    convert("torch_zoo:encoder", tmp_path / "b")
    for name in ("model.onnx", "classical.onnx"):
        content = (tmp_path / "b" / name).read_bytes()
        assert b"site-packages" not in content
        assert b"torch_zoo.py" not in content


def test_causal_stays_a_flag(tmp_path):
    convert("torch_zoo:causal", tmp_path / "b")
    nodes = [n for n in onnx.load(tmp_path / "b" / "model.onnx").graph.node if n.op_type == "QuantumAttention"]
    assert [next(a.i for a in n.attribute if a.name == "is_causal") for n in nodes] == [1, 1]


def test_weights_that_are_returned_are_left_alone(tmp_path):
    with pytest.raises(QexportError, match="probabilities are also used by"):
        convert("torch_zoo:multi_head_weights", tmp_path / "b")


def test_transformer_encoder_layer(tmp_path):
    report = convert("torch_zoo:transformer_layer", tmp_path / "b", strategy="stratified", num_samples=64)
    assert [s["module"] for s in report.sites] == ["self_attn"]
    module, inputs = torch_zoo.transformer_layer()
    assert_same_model(tmp_path / "b", module, inputs)


@pytest.mark.parametrize(("name", "heads"), [("joined_heads", (4, 4, 8)), ("one_key_head", (4, 1, 8))])
def test_attention_that_the_exporter_refuses(tmp_path, name, heads):
    report = convert(f"torch_zoo:{name}", tmp_path / "b", strategy="stratified", num_samples=64)
    assert [(s["q_heads"], s["kv_heads"], s["head_size"]) for s in report.sites] == [heads]
    module, inputs = getattr(torch_zoo, name)()[:2]
    assert_same_model(tmp_path / "b", module, inputs)
    assert_same_model(tmp_path / "b", module, tuple(torch.cat([t, t[:, :, :4]], 2)[:1] for t in inputs))


def test_an_axis_that_the_model_fixes_is_told(tmp_path):
    report = convert("torch_zoo:fixed_length", tmp_path / "b")
    assert report.manifest["inputs"][0]["shape"] == ["batch", 9, 32]
    assert report.notes == ["sequence is fixed at 9: the model computes with that size"]


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 5e-3), ("bfloat16", None)])
def test_half_types(tmp_path, dtype, atol):
    report = convert("torch_zoo:masked", tmp_path / "b", dtype=dtype, strategy="stratified", num_samples=64)
    model = onnx.load(tmp_path / "b" / "model.onnx")
    wanted = getattr(onnx.TensorProto, dtype.upper())
    assert {i.data_type for i in model.graph.initializer if len(i.dims) == 2} == {wanted}
    if atol is None:
        assert report.max_difference is None
        assert "bfloat16" in report.notes[0]
        return
    assert report.max_difference < 2e-2
    module, inputs = torch_zoo.masked()
    got = session(tmp_path / "b").run(None, {k: v.numpy() for k, v in inputs.items()})[0]
    np.testing.assert_allclose(got, torch_outputs(module, inputs)[0], rtol=0, atol=atol * 4)


@pytest.mark.parametrize("opset", [17, 18, 22])
def test_low_opsets(tmp_path, opset):
    report = convert("torch_zoo:causal", tmp_path / "b", opset=opset, strategy="stratified", num_samples=64)
    assert report.manifest["opset"] == opset
    assert [s["module"] for s in report.sites] == ["layers.0", "layers.1"]
    module, inputs = torch_zoo.causal()
    assert_same_model(tmp_path / "b", module, larger(inputs))
    assert_same_model(tmp_path / "b", module, larger(inputs), library=False)


def test_ops_that_changed_in_opset_18_are_lowered(tmp_path):
    convert("torch_zoo:split_and_pad", tmp_path / "b", opset=17, strategy="stratified", num_samples=64)
    ops = {n.op_type for n in onnx.load(tmp_path / "b" / "model.onnx").graph.node}
    assert {"Pad", "ReduceMean"} <= ops
    module, inputs = torch_zoo.split_and_pad()
    assert_same_model(tmp_path / "b", module, inputs)


@pytest.mark.parametrize("dynamic", [True, False])
def test_archives(tmp_path, dynamic):
    module, inputs = torch_zoo.encoder()
    axes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=40)},) if dynamic else None
    torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=axes), tmp_path / "encoder.pt2")
    report = convert(tmp_path / "encoder.pt2", tmp_path / "b", strategy="stratified", num_samples=64)
    assert report.manifest["source"] == {"kind": "pt2", "name": "encoder.pt2", "task": None, "dtype": None}
    assert [s["module"] for s in report.sites] == ["layers.0", "layers.1"]
    assert_same_model(tmp_path / "b", module, inputs)
    if dynamic:
        assert_same_model(tmp_path / "b", module, larger(inputs))
    else:
        assert "fixed shapes" in report.notes[0]


@pytest.mark.parametrize("opset", [18, 23])
def test_a_file_that_torch_exported(tmp_path, opset):
    """Module names come from its metadata; at opset 23 its mask has no query axis, which onnxruntime's Attention refuses."""
    module, inputs = torch_zoo.masked()
    path = tmp_path / "exported.onnx"
    torch.onnx.export(module.eval(), kwargs=inputs, dynamo=True, opset_version=opset, verbose=False).save(path)
    report = convert(path, tmp_path / "b", strategy="stratified", num_samples=64)
    assert [s["module"] for s in report.sites] == ["layers.0", "layers.1"]
    assert bool(report.notes) == (opset == 23)
    assert b"site-packages" not in (tmp_path / "b" / "model.onnx").read_bytes()
    for library in (False, True):
        assert_same_model(tmp_path / "b", module, inputs, library)


def test_torch_and_the_model_say_nothing(tmp_path):
    code = f"import qexport; qexport.convert('torch_zoo:loud', {str(tmp_path / 'b')!r})"
    folder = torch_zoo.__file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("torch_zoo:missing", UsageError, ["torch_zoo", "has no 'missing'"]),
        ("torch_zoo:NOT_CALLABLE", UsageError, ["int", "not a callable"]),
        ("no_such_module:f", UsageError, ["no module named 'no_such_module'"]),
        ("torch_zoo:returns_module_only", UsageError, ["must return (nn.Module, example inputs)", "Linear"]),
        ("torch_zoo:returns_numbers", UsageError, ["must return", "float"]),
        ("torch_zoo:returns_text", UsageError, ["must return", "(str, str)"]),
        ("torch_zoo:raises", QexportError, ["the callable failed", "the weights are on another disk"]),
        ("torch_zoo:wrong_inputs", QexportError, ["does not run on its example inputs"]),
        ("torch_zoo:data_dependent", QexportError, ["torch cannot export"]),
        ("torch_zoo:no_attention", QexportError, ["no attention found"]),
        (":f", UsageError, ["package.module:callable"]),
    ],
)
def test_errors(name, kind, words, tmp_path):
    with pytest.raises(kind) as caught:
        convert(name, tmp_path / "b")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_archive(tmp_path):
    (tmp_path / "bad.pt2").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(QexportError, match=r"bad\.pt2: not a \.pt2 archive"):
        convert(tmp_path / "bad.pt2", tmp_path / "b")


def test_a_type_for_an_archive(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"")
    with pytest.raises(UsageError, match="dtype is for modules"):
        convert(tmp_path / "m.pt2", tmp_path / "b", dtype="float16")
