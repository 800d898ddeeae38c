"""qexport.convert of models that hold qexport.nn: the draws of torch in onnxruntime, and the classical model beside it."""

import subprocess
import sys

import nn_zoo
import numpy as np
import onnx
import pytest
import torch

from qexport.conversion import convert
from qexport.errors import QexportError
from qexport.nn import exact_attention
from qexport.runtime import session

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
ATOL = 1e-5
CALLABLES = [
    *("plain", "length_first", "weights", "padded", "cross", "cross_float_mask", "causal", "added_keys"),
    *("heads", "replaced_encoder", "grouped"),
]


def feeds(folder, inputs):
    names = [i.name for i in session(folder / "classical.onnx", library=False).get_inputs()]
    return dict(zip(names, (x.numpy() for x in inputs), strict=True))


def run_torch(module, inputs):
    """Without torch's fused path: it packs a padded batch, whose values behind the padding are then others to draw from."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            outputs = module.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return [x.numpy() for x in (outputs if isinstance(outputs, tuple) else (outputs,))]


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=ATOL * np.abs(b).max())


def drawing_layers(folder):
    """The layer that each QuantumAttention of a bundle draws as, in the order of the sites."""
    nodes = [node for node in onnx.load(folder / "model.onnx").graph.node if node.op_type == "QuantumAttention"]
    return [next(a.i for a in node.attribute if a.name == "layer") for node in nodes]


def set_seed(module, seed):
    for part in module.modules():
        if hasattr(part, "seed"):
            part.seed.fill_(seed)


def other_shape(inputs):
    """The same inputs with two of the three items (not the axes of a mask)."""
    return tuple(x[:2] if len(x) == 3 else x for x in inputs)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("bundles"), {}

    def bundle(name):
        if name not in made:
            made[name] = root / name, convert(f"nn_zoo:{name}", root / name)
        return made[name]

    return bundle


@pytest.mark.parametrize("name", CALLABLES)
def test_onnxruntime_draws_what_torch_draws(name, bundles):
    folder, report = bundles(name)
    assert report.left_alone == []
    module, inputs = getattr(nn_zoo, name)()[:2]
    model, classical = session(folder / "model.onnx"), session(folder / "classical.onnx", library=False)
    for given in (inputs, other_shape(inputs)):
        values = feeds(folder, given)
        sampled = run_torch(module, given)
        assert_close(model.run(None, values), sampled)
        with exact_attention():
            exact = run_torch(module, given)
        assert_close(classical.run(None, values), exact)
        assert_close(session(folder / "model.onnx", library=False).run(None, values), exact)
        assert np.abs(sampled[0] - exact[0]).max() > 1e-3, "it is sampled"
    if name != "grouped":
        set_seed(module, 77)
        values = feeds(folder, inputs)
        assert_close(model.run(None, values | {"seed": np.array(77)}), run_torch(module, inputs))


@pytest.mark.parametrize("name", ["plain", "cross", "replaced_encoder", "heads", "grouped"])
def test_sites_have_the_settings_of_their_modules(name, bundles):
    folder, report = bundles(name)
    seeds = {"grouped": 4}
    default = next(i for i in onnx.load(folder / "model.onnx").graph.initializer if i.name == report.manifest["seed_input"])
    assert onnx.numpy_helper.to_array(default) == seeds.get(name, 5)
    assert [site["layer"] for site in report.sites] == list(range(len(report.sites)))
    layers = drawing_layers(folder)
    found = [(s["module"], n, s["strategy"], s["num_samples"]) for s, n in zip(report.sites, layers, strict=True)]
    assert (
        found
        == {
            "plain": [("attention", 2, "adaptive", [6])],
            "cross": [("attention", 2, "adaptive", [6])],
            "replaced_encoder": [
                ("encoder.layers.0.self_attn", 0, "stratified", [6]),
                ("encoder.layers.1.self_attn", 1, "stratified", [6]),
            ],
            "heads": [
                ("attention", 2, "stratified", [3, 8]),
                ("attention", 2 + 65536, "hybrid", [6]),
                ("attention", 2 + 2 * 65536, "exact", [32]),  # which reads no budget: the default
            ],
            "grouped": [("", 7, "stratified", [3, 4, 5, 6])],
        }[name]
    )


def test_what_is_named_wins(tmp_path):
    report = convert("nn_zoo:plain", tmp_path / "b", strategy="hybrid", num_samples=9, seed=8)
    site = report.sites[0]
    assert (site["strategy"], site["num_samples"], site["control_variate"]) == ("hybrid", [9], 1)
    assert drawing_layers(tmp_path / "b") == [2]
    opened = session(tmp_path / "b")
    module, inputs = nn_zoo.SelfAttention(quantum_backend="hybrid", num_samples=9, seed=8), (nn_zoo.rows(),)
    module.load_state_dict(nn_zoo.plain()[0].state_dict())
    assert_close(opened.run(None, {opened.get_inputs()[0].name: inputs[0].numpy()}), run_torch(module, inputs))
    assert convert("nn_zoo:plain", tmp_path / "c", num_samples=9, dry_run=True).sites[0]["strategy"] == "adaptive"
    recipe = {"layers": [{"match": "encoder.layers.1.*", "strategy": "tree", "error_tolerance": 0.1}]}
    sites = convert("nn_zoo:replaced_encoder", tmp_path / "d", recipe=recipe, dry_run=True).sites
    assert [(s["strategy"], s["error_tolerance"]) for s in sites] == [("stratified", 0.0), ("tree", 0.1)]


def test_a_classical_module_is_converted_like_any_other(tmp_path):
    report = convert("nn_zoo:classical_module", tmp_path / "b", dry_run=True)
    assert [s["strategy"] for s in report.sites] == ["tree"]


def test_the_padded_encoder_of_torch(tmp_path):
    """Its fused path leaves zeros where the batch is padded; the export computes those rows, and is compared with that."""
    report = convert("nn_zoo:encoder", tmp_path / "b", strategy="exact")
    assert report.max_difference < 1e-5
    assert torch.backends.mha.get_fastpath_enabled(), "convert leaves it as it was"
    module, inputs = nn_zoo.encoder()[:2]
    got = session(tmp_path / "b").run(None, feeds(tmp_path / "b", inputs))
    assert_close(got, run_torch(module, inputs))
    with torch.no_grad():
        fused = module(*inputs).numpy()
    seen = ~inputs[1].numpy()
    assert (fused[~seen] == 0).all()
    np.testing.assert_allclose(got[0][seen], fused[seen], rtol=0, atol=1e-5)


def test_no_two_sites_draw_alike(tmp_path):
    """The first is torch's own and gets a layer, the second brought 0 along."""
    sites = convert("nn_zoo:mixed", tmp_path / "b").sites
    assert [(s["module"], s["layer"]) for s in sites] == [("", 0), ("ours", 1)]
    assert drawing_layers(tmp_path / "b") == [1, 0]


@pytest.mark.parametrize("opset", [17, 22])
def test_opsets_without_attention(opset, tmp_path):
    with pytest.raises(QexportError, match=f"qexport.nn needs opset 23 or newer, got {opset}; for an older one ") as caught:
        convert("nn_zoo:plain", tmp_path / "b", opset=opset)
    assert "\n" not in str(caught.value)


def test_the_mend_for_older_opsets(tmp_path):
    assert len(convert("nn_zoo:classical_module", tmp_path / "b", opset=17, dry_run=True).sites) == 1


def test_opset_24(tmp_path):
    convert("nn_zoo:padded", tmp_path / "b", opset=24)
    module, inputs = nn_zoo.padded()[:2]
    assert_close(session(tmp_path / "b").run(None, feeds(tmp_path / "b", inputs)), run_torch(module, inputs))


def test_archives(tmp_path):
    """In a process of its own, which has not imported qexport.nn and so does not know its operators yet."""
    module, inputs, axes = nn_zoo.plain()
    torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=axes), tmp_path / "plain.pt2")
    command = [sys.executable, "-P", "-m", "qexport", "convert", str(tmp_path / "plain.pt2"), "-o", str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    given = other_shape(inputs)
    assert_close(session(tmp_path / "b").run(None, feeds(tmp_path / "b", given)), run_torch(module, given))


def test_half_precision(tmp_path):
    convert("nn_zoo:half", tmp_path / "b")
    module, inputs = nn_zoo.half()[:2]
    got = session(tmp_path / "b").run(None, feeds(tmp_path / "b", inputs))[0]
    np.testing.assert_allclose(got, run_torch(module, inputs)[0], rtol=0, atol=1e-2)


def test_a_bundle_is_not_converted_again(bundles, tmp_path):
    with pytest.raises(QexportError, match="holds QuantumAttention already; convert the classical model it was made from"):
        convert(bundles("plain")[0] / "model.onnx", tmp_path / "b")
    report = convert(bundles("plain")[0] / "classical.onnx", tmp_path / "b")
    sites = [(s["module"], s["strategy"], s["num_samples"]) for s in report.sites]
    assert sites == [("attention", "adaptive", [6])], "the classical model still knows how its module samples"
    assert drawing_layers(tmp_path / "b") == [2]


def test_a_seed_of_the_caller_is_an_input_without_use(tmp_path):
    report = convert("nn_zoo:seed_input", tmp_path / "b")
    opened = session(tmp_path / "b")
    module, inputs = nn_zoo.seed_input()[:2]
    values = {opened.get_inputs()[0].name: inputs[0].numpy(), report.manifest["seed_input"]: np.array(3)}
    names = {i.name for i in opened.get_inputs()}
    assert_close(opened.run(None, values | {n: np.array(3) for n in names - set(values)}), run_torch(module, inputs))
