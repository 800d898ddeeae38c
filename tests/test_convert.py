"""convert of .onnx files, end to end and without torch: the bundle, its manifest, and both models in onnxruntime."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from decomposed import HEAD_SIZE, HEADS, POSITIONS, VOCAB, WIDTH, encoder, feeds, save
from onnx import numpy_helper

from qexport import conversion
from qexport.bundle import Bundle
from qexport.conversion import convert
from qexport.runtime import session
from qexport.validation import validate

TIGHT = 1e-5


def run(path, inputs, library):
    opened = session(path, library=library)
    return dict(zip([o.name for o in opened.get_outputs()], opened.run(None, inputs), strict=True))


def assert_equal(expected, found, atol=TIGHT):
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol * np.abs(array).max())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def bundle(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "encoder"
    report = convert(source, folder, strategy="stratified", num_samples=POSITIONS)
    assert report.path == folder
    return Bundle.open(folder, verify=True)


@pytest.mark.parametrize("library", [False, True])
def test_equals_the_source_with_and_without_the_library(source, bundle, library):
    expected = run(source, feeds(), False)
    assert_equal(expected, run(bundle.classical_path, feeds(), False))
    assert_equal(expected, run(bundle.model_path, feeds(), library))


def test_few_samples_differ_with_the_library_only(source, tmp_path):
    convert(source, tmp_path / "b", strategy="stratified", num_samples=2)
    expected = run(source, feeds(), False)
    assert_equal(expected, run(tmp_path / "b" / "model.onnx", feeds(), False))
    sampled = run(tmp_path / "b" / "model.onnx", feeds(), True)
    assert np.abs(sampled["hidden"] - expected["hidden"]).max() > 0.01


def test_manifest(bundle):
    manifest = bundle.manifest
    assert manifest["source"] == {"kind": "onnx", "name": "encoder.onnx", "task": None, "dtype": None}
    assert (manifest["opset"], manifest["ir_version"], manifest["min_onnxruntime"]) == (23, 10, "1.23")
    assert manifest["seed_input"] == "seed"
    assert manifest["left_alone"] == []
    assert manifest["limits"] == {"sequence": POSITIONS}
    assert manifest["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"], "kind": "token_ids", "high": VOCAB},
        {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "sequence"], "kind": "mask", "high": 2},
    ]
    for layer, site in enumerate(manifest["sites"]):
        assert site["layer"] == layer
        assert site["module"] == f"encoder.layer.{layer}.self"
        assert site["output"] == f"o{layer}"
        assert (site["q_heads"], site["kv_heads"], site["head_size"]) == (HEADS, HEADS, HEAD_SIZE)
        assert site["num_samples"] == [POSITIONS]
    assert len(manifest["sites"]) == 2
    assert manifest["metrics"]["max_difference_to_source"] < TIGHT


def test_files(bundle):
    names = set(bundle.manifest["files"])
    assert {"model.onnx", "classical.onnx", "lib/libqexport_ops.so"} <= names
    assert {f"test_data_set_0/{n}.pb" for n in ("input_0", "input_1", "output_0")} <= names
    assert not any("data" in name.rpartition(".")[2] for name in names)


def test_samples_are_the_classical_models(bundle):
    def read(kind):
        found = {}
        for file in sorted(bundle.samples_path.glob(f"{kind}_*.pb")):
            tensor = onnx.TensorProto.FromString(file.read_bytes())
            found[tensor.name] = numpy_helper.to_array(tensor)
        return found

    assert_equal(run(bundle.classical_path, read("input"), False), read("output"), atol=0)


def test_model_file(bundle):
    model = onnx.load(bundle.model_path)
    onnx.checker.check_model(model)
    assert model.ir_version == 10
    assert {e.domain: e.version for e in model.opset_import} == {"": 23, "com.qexport": 1}
    assert [(f.domain, f.name) for f in model.functions] == [("com.qexport", "QuantumAttention")]
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask", "seed"]
    assert "seed" in {i.name for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "QuantumAttention"]
    for layer, node in enumerate(nodes):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["layer"] == layer
        assert attributes["scale"] == pytest.approx(HEAD_SIZE**-0.5)
        assert attributes["control_variate"] == 1
        assert node.output[0] == f"o{layer}"
        props = {p.key: p.value for p in node.metadata_props}
        assert props["qexport.module"] == f"encoder.layer.{layer}.self"
        assert "Attention" in props["qexport.fallback"]
    classical = onnx.load(bundle.classical_path)
    assert [n.output[0] for n in classical.graph.node if n.op_type == "Attention"] == ["o0", "o1"]


def test_seed_and_recipe_reach_the_model(source, tmp_path):
    layers = [{"match": "encoder.layer.0.*", "strategy": "exact"}, {"match": "*layer.1*", "num_samples": [3, 5]}]
    report = convert(source, tmp_path / "b", recipe={"strategy": "hybrid", "layers": layers}, seed=11, control_variate=False)
    assert [s["strategy"] for s in report.sites] == ["exact", "hybrid"]
    assert report.sites[1]["num_samples"] == [3, 5]
    assert report.sites[0]["control_variate"] == 0
    model = onnx.load(tmp_path / "b" / "model.onnx")
    seed = next(i for i in model.graph.initializer if i.name == "seed")
    assert int(numpy_helper.to_array(seed)) == 11


def test_the_seed_input_gets_another_name_when_it_is_taken(tmp_path):
    path = save(tmp_path, extra="seed = Identity(hidden)", outputs=", float[batch,sequence,16] seed")
    report = convert(path, tmp_path / "b")
    assert report.manifest["seed_input"] == "qexport_seed"
    assert "qexport_seed" in {i.name for i in session(tmp_path / "b").get_overridable_initializers()}


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 23])
def test_source_opsets(tmp_path, opset):
    path = save(tmp_path, opset=opset)
    report = convert(path, tmp_path / "b", strategy="stratified", num_samples=POSITIONS)
    assert len(report.sites) == 2
    assert_equal(run(path, feeds(), False), run(tmp_path / "b" / "model.onnx", feeds(), True))


@pytest.mark.parametrize("names", [(None, None), ("?", "2*n"), ("*", "länge"), ("batch size", "axis_")])
def test_axes_without_a_name_to_look_up(tmp_path, names):
    """Files name axes as they like, or not at all; the ids get a name that is no identifier, either."""
    model = encoder()
    for node in model.graph.node:
        node.input[:] = ["ids:0" if name == "input_ids" else name for name in node.input]
    model.graph.input[0].name = "ids:0"
    for value in (*model.graph.input, *model.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            dim.Clear() if name is None else setattr(dim, "dim_param", name)
    onnx.save(model, tmp_path / "m.onnx")
    convert(model=tmp_path / "m.onnx", output=tmp_path / "b")
    given = {name.replace("input_ids", "ids:0"): array for name, array in feeds().items()}
    assert_equal(run(tmp_path / "m.onnx", given, False), run(tmp_path / "b" / "model.onnx", given, False))
    report = validate(tmp_path / "b", batch=2)  # generated: as long as the model takes, the mask as well
    assert report.passed
    assert report.outputs["fallback"]["hidden"]["elements"] > POSITIONS * WIDTH


@pytest.mark.parametrize(("opset", "least"), [(17, "1.20"), (21, "1.20"), (22, "1.21"), (24, "1.24")])
def test_target_opsets(source, tmp_path, opset, least):
    report = convert(source, tmp_path / "b", strategy="stratified", num_samples=POSITIONS, opset=opset)
    assert report.manifest["opset"] == opset
    assert report.manifest["min_onnxruntime"] == least
    ops = [n.op_type for n in onnx.load(tmp_path / "b" / "classical.onnx").graph.node]
    assert ops.count("Attention") == (2 if opset >= 23 else 0)
    expected = run(source, feeds(), False)
    for name, library in (("classical", False), ("model", False), ("model", True)):
        assert_equal(expected, run(tmp_path / "b" / f"{name}.onnx", feeds(), library))


def test_dry_run_writes_nothing(source, tmp_path):
    report = convert(source, tmp_path / "b", dry_run=True, strategy="naive")
    assert report.path is None
    assert [s["strategy"] for s in report.sites] == ["naive", "naive"]
    assert list(tmp_path.iterdir()) == []
    assert json.loads(json.dumps(report.to_dict()))["path"] is None


def test_sites_that_stay_are_listed(tmp_path):
    path = save(tmp_path, extra="kept = ReduceMean(p0)", outputs=", float[1,1,1,1] kept")
    report = convert(path, tmp_path / "b")
    assert [s["output"] for s in report.sites] == ["o1"]
    assert report.sites[0]["layer"] == 0
    assert report.left_alone[0]["module"] == "encoder.layer.0.self"
    assert "also used by ReduceMean" in report.left_alone[0]["reason"]


def test_an_old_bundle_is_replaced_and_survives_a_failure(source, tmp_path):
    target = tmp_path / "b"
    convert(source, target, strategy="stratified", num_samples=4)
    before = (target / "manifest.json").read_bytes()

    def stop(step, done):
        if step == "converting attention":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, strategy="stratified", num_samples=8, progress=stop)
    assert (target / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    convert(source, target, strategy="stratified", num_samples=8)
    assert Bundle.open(target, verify=True).manifest["sites"][0]["num_samples"] == [8]


def test_steps_are_told(source, tmp_path):
    steps = []
    convert(source, tmp_path / "b", progress=lambda *step: steps.append(step))
    assert steps[0] == ("reading the model", 0.0)
    assert steps[-1][0] == "writing the bundle"


def test_onnx_files_need_no_torch_and_print_nothing(source, tmp_path):
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import qexport
assert len(qexport.convert({str(source)!r}, {str(tmp_path / "b")!r}).sites) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_external_weights_are_written_once_and_shared(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "EXTERNAL_ABOVE", 1000)
    convert(source, tmp_path / "b", strategy="stratified", num_samples=POSITIONS)
    names = set(Bundle.open(tmp_path / "b", verify=True).manifest["files"])
    assert [n for n in names if n.endswith(".data")] == ["model.onnx.data"]
    (tmp_path / "b").rename(tmp_path / "moved")
    expected = run(source, feeds(), False)
    for name in ("classical", "model"):
        assert_equal(expected, run(tmp_path / "moved" / f"{name}.onnx", feeds(), True))


def test_a_source_with_external_weights(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save(encoder(), folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64)
    assert (folder / "weights.bin").is_file()
    convert(folder / "m.onnx", tmp_path / "b", strategy="stratified", num_samples=POSITIONS)
    expected = run(folder / "m.onnx", feeds(), False)
    (folder / "weights.bin").unlink()
    assert_equal(expected, run(tmp_path / "b" / "model.onnx", feeds(), False))


def test_a_file_of_onnxruntimes_optimizer(tmp_path):
    """Embedding, attention and normalisation fused to com.microsoft ops, and LayerNormalization in an opset without it."""
    width, rng = 16, np.random.default_rng(0)
    text = """
    <ir_version: 7, opset_import: ["": 14, "com.microsoft": 1]>
    g (int32[batch,sequence] input_ids, int32[batch,sequence] attention_mask) => (float[batch,sequence,16] y) {
      e, m = com.microsoft.EmbedLayerNormalization(input_ids, , words, places, , gamma, beta, attention_mask)
      a = com.microsoft.Attention<num_heads=2>(e, w, b, m)
      s = com.microsoft.SkipLayerNormalization(a, e, gamma, beta)
      y = LayerNormalization<axis=-1, epsilon=0.00001>(s, gamma, beta)
    }"""
    model = onnx.parser.parse_model(text)
    shapes = {"words": (30, width), "places": (20, width), "gamma": (width,), "beta": (width,), "w": (width, 48), "b": (48,)}
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    path = tmp_path / "optimized.onnx"
    onnx.save(model, path)
    inputs = {k: v.astype(np.int32) % 30 for k, v in feeds().items()}
    expected = run(path, inputs, False)
    for opset in (17, 23):
        report = convert(path, tmp_path / str(opset), strategy="stratified", num_samples=64, opset=opset)
        assert [(s["q_heads"], s["head_size"]) for s in report.sites] == [(2, 8)]
        assert report.manifest["limits"] == {"sequence": 20}
        assert report.manifest["inputs"][0]["high"] == 30
        for library in (False, True):
            assert_equal(expected, run(tmp_path / str(opset) / "model.onnx", inputs, library))


def test_the_longest_sequence_is_measured(tmp_path):
    """A table of positions that is looked up by computed ids, which start behind a padding id as RoBERTa's do."""
    model = encoder()
    for node in model.graph.node:
        if "ids" in node.output:
            node.output[0] = "ids_from_0"
    at = next(i for i, node in enumerate(model.graph.node) if "ids_from_0" in node.output)
    model.graph.node.insert(at + 1, onnx.helper.make_node("Add", ["ids_from_0", "second"], ["ids"], name="shift"))
    for tensor in model.graph.initializer:
        if tensor.name == "positions":
            tensor.CopyFrom(numpy_helper.from_array(np.append(np.arange(POSITIONS + 9), 0)[None], "positions"))
    onnx.save(model, tmp_path / "m.onnx")
    report = convert(tmp_path / "m.onnx", tmp_path / "b")
    assert report.manifest["limits"] == {"sequence": POSITIONS - 2}


def test_attention_inside_a_function_of_the_file(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["": 17, "local": 1]>
    g (float[batch,2,sequence,8] q, float[batch,2,sequence,8] k, float[batch,2,sequence,8] v)
      => (float[batch,2,sequence,8] y) { x = local.Attend(q, k, v) y = local.Attend(x, k, v) }
    <domain: "local", opset_import: ["": 17]> Attend (q, k, v) => (y) {
      kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) p = Softmax<axis=-1>(s) y = MatMul(p, v)
    }"""
    path = tmp_path / "functions.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    report = convert(path, tmp_path / "b", strategy="stratified", num_samples=64)
    assert len({s["name"] for s in report.sites}) == 2
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal((3, 2, 5, 8)).astype(np.float32) for n in "qkv"}
    assert_equal(run(path, inputs, False), run(tmp_path / "b" / "model.onnx", inputs, True))
    functions = onnx.load(tmp_path / "b" / "model.onnx").functions
    assert [f.domain for f in functions] == ["com.qexport"]
