"""resilience: cells and their mitigation, metrics, thresholds, what a sweep finds, the picture and the command."""

import json

import numpy as np
import onnx
import pytest
import torch
from bundle_factory import make_bundle
from decomposed import feeds, save

from qexport import convert, measure_resilience, metrics, session
from qexport.bundle import Bundle
from qexport.cli import main
from qexport.data import load_inputs
from qexport.errors import QexportError, UsageError
from qexport.noise.model import NoiseModel, parse_channels
from qexport.resilience.cells import make_cell
from qexport.resilience.plot import draw
from qexport.resilience.threshold import ABOVE, BELOW, WITHIN, crossing, threshold
from qexport.runtime import run
from qexport.validation.statistics import confidence_interval

DEPOLARIZING = (NoiseModel("depolarizing"),)
VOCAB = 24

DECODER = f"""
<ir_version: 10, opset_import: ["": 23]>
g (int64[batch,sequence] input_ids) => (float[batch,sequence,{VOCAB}] logits)
{{ x = Gather(words, input_ids) q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
  y = Attention<q_num_heads=2, kv_num_heads=2, is_causal=CAUSAL>(q, k, v) h = Add(x, y) logits = MatMul(h, head) }}"""


def decoder(folder, causal: int = 1):
    """A bundle of a one-layer model from token ids to logits of the next token."""
    model = onnx.parser.parse_model(DECODER.replace("CAUSAL", str(causal)))
    rng = np.random.default_rng(1)
    shapes = {"words": (VOCAB, 16), "wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "head": (16, VOCAB)}
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape).astype(np.float32) / (1 if name == "words" else 4)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, folder / "decoder.onnx")
    convert(folder / "decoder.onnx", folder / "bundle", strategy="exact")
    return folder / "bundle"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return decoder(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("encoder") / "bundle", attention={"strategy": "exact"})


def by(report, mitigation="none"):
    """{(shots, level): cell} of one mitigation."""
    return {(cell["shots"], cell["level"]): cell for cell in report.cells if cell["mitigation"] == mitigation}


def test_a_mitigation_has_its_own_runs():
    (plain,) = make_cell("none", DEPOLARIZING, 0.1, 60).runs
    assert (plain.scale, plain.weight, plain.shots) == (0.1, 1.0, 60)
    zne = make_cell("zne", DEPOLARIZING, 0.1, 63)
    assert [run.weight for run in zne.runs] == pytest.approx([3, -3, 1])
    assert [run.scale for run in zne.runs] == pytest.approx([0.1, 0.2, 0.3])
    assert sum(run.shots for run in zne.runs) == 63
    assert {run.shots for run in make_cell("zne", DEPOLARIZING, 0.1, "inf").runs} == {"inf"}

    flip = 0.1 / 2
    code = make_cell("repetition:3", DEPOLARIZING, 0.1, 60)
    assert code.noise == "bit_flip:1"
    assert code.runs[0].scale == pytest.approx(3 * flip**2 - 2 * flip**3)
    both = flip * (1 - 0.1) + (1 - flip) * 0.1
    two = parse_channels("depolarizing,readout")
    assert make_cell("repetition:3", two, 0.1, 60).runs[0].scale == pytest.approx(3 * both**2 - 2 * both**3)
    inverted = make_cell("readout_inversion", two, 0.1, 60)
    assert inverted.invert
    assert inverted.runs[0].scale == pytest.approx(both)
    thermal = parse_channels("thermal_relaxation:T1=2:T2=1")
    assert make_cell("readout_inversion", thermal, 0.1, 60).noise == "thermal_relaxation:1:T1=2:T2=1"


@pytest.mark.parametrize(
    ("mitigation", "noise", "level", "shots", "message"),
    [
        ("none", "depolarizing", 1.5, 9, r"noise depolarizing at level 1\.5 is refused: .* in 0 to 1\.33333 .*; lower it"),
        ("zne", "depolarizing", 0.5, 9, r"at level 1\.5, 3 times 0\.5, is refused: .* in 0 to 1\.33333"),
        ("none", "thermal_relaxation:T2=3", 0.1, 9, r"T2 must be at most 2 T1 = 2, got 3"),
        ("zne", "depolarizing", 0.1, 2, r"zne with 3 scales needs at least 3 shots, got 2"),
        ("repetition:3", "amplitude_damping", 0.1, 9, r"repetition corrects flips .*, got amplitude_damping"),
        ("repetition:4", "depolarizing", 0.1, 9, r"must be an odd number in 1 to 999, got 4"),
        ("readout_inversion", "amplitude_damping,readout", 0.1, 9, r"takes one noise model here, or several of"),
        ("pec", "depolarizing", 0.1, 9, r"mitigation pec is not swept in models; give none, zne"),
        ("readout_inversion:project", "readout", 0.1, 9, r"mitigation readout_inversion:project is not swept in models"),
        ("magic", "depolarizing", 0.1, 9, r"mitigation magic is not swept in models; give none, zne"),
        ("zne:x", "depolarizing", 0.1, 9, r"mitigation must be one of .*, got 'zne:x'"),
    ],
)
def test_what_a_cell_refuses(mitigation, noise, level, shots, message):
    with pytest.raises(UsageError, match=message):
        make_cell(mitigation, parse_channels(noise), level, shots)


def test_thresholds():
    levels = [0.0, 0.1, 0.2, 0.4]
    assert crossing(levels, [0.0, 0.01, 0.03, 0.5], 0.02) == pytest.approx(0.15)
    assert crossing(levels, [0.0, 0.01, 0.015, 0.02], 0.02) is None
    assert crossing(levels, [0.03, 0.01, 0.015, 0.05], 0.02) is None
    losses = np.array([[0.0, 0.0], [0.01, 0.0], [0.03, 0.04], [0.5, 0.6]])
    found = threshold(levels, losses, 0.02)
    assert found["verdict"] == WITHIN
    assert found["level"] == pytest.approx(0.1 + 0.1 * 0.015 / 0.03)
    assert found["level_ci95"] == pytest.approx(list(confidence_interval([0.15, 0.15])))
    assert threshold(levels, losses, 0.7) == {"level": None, "level_ci95": None, "verdict": ABOVE}
    assert threshold(levels, losses + 1, 0.7)["verdict"] == BELOW
    assert threshold(levels, losses[:, :1], 0.02)["level_ci95"] is None


def test_metrics_against_torch(language_model):
    rng = np.random.default_rng(0)
    ids, logits = rng.integers(0, VOCAB, (3, 7)), rng.standard_normal((3, 7, VOCAB)).astype(np.float32)
    other = logits + rng.standard_normal(logits.shape).astype(np.float32)
    manifest = Bundle.open(language_model).manifest
    found = metrics.Metric("perplexity", "logits", ("batch", "sequence", VOCAB), "input_ids")
    total, count = found.add(manifest, {"input_ids": ids}, logits, other)
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(other[:, :-1]).flatten(0, 1), torch.from_numpy(ids[:, 1:].ravel())
    )
    assert count == 18
    assert found.mean(total, count) == pytest.approx(float(wanted.exp()), rel=1e-6)
    assert found.loss(3.0, 2.0) == pytest.approx(0.5)
    found = metrics.Metric("top1", "logits", ("batch", "sequence", VOCAB))
    total, count = found.add(manifest, {"input_ids": ids}, logits, other)
    assert (total, count) == ((logits.argmax(-1) == other.argmax(-1)).sum(), 21)
    assert found.loss(0.9, 1.0) == pytest.approx(0.1)


def test_padding_counts_for_nothing(encoder):
    manifest = Bundle.open(encoder).manifest
    feed = feeds(batch=3, sequence=8)
    rng = np.random.default_rng(0)
    base, value = (rng.standard_normal((3, 8, 16)).astype(np.float32) for _ in range(2))
    found = metrics.Metric("cosine", "hidden", ("batch", "sequence", 16))
    before = found.add(manifest, feed, base, value)
    value[feed["attention_mask"] == 0] = 1e6
    assert found.add(manifest, feed, base, value) == pytest.approx(before)
    value[feed["attention_mask"] == 1] = 0
    assert found.add(manifest, feed, base, base) == (pytest.approx(3), 3)
    pooled = base[0].mean(0), base[0].mean(0) + 1
    shifted = base.copy()
    shifted[0] += 1
    total, _ = found.add(manifest, feed, base, shifted)
    cosine = pooled[0] @ pooled[1] / np.linalg.norm(pooled[0]) / np.linalg.norm(pooled[1])
    assert total == pytest.approx(2 + cosine, rel=1e-5)


def test_the_metric_follows_from_the_model(language_model, encoder, tmp_path):
    def chosen(folder, name=None):
        bundle = Bundle.open(folder)
        inputs = load_inputs(bundle, None)
        return metrics.choose_metric(bundle, inputs, session(bundle.classical_path, library=False), name)

    assert chosen(language_model) == metrics.Metric("perplexity", "logits", ("batch", "sequence", VOCAB), "input_ids")
    assert chosen(language_model, "top1").name == "top1"
    assert chosen(encoder).name == "cosine"
    assert chosen(decoder(tmp_path, causal=0)).name == "top1"  # each token sees the ones to predict
    with pytest.raises(UsageError, match=r"metric perplexity does not fit .*; it has cosine"):
        chosen(encoder, "perplexity")
    with pytest.raises(UsageError, match=r"metric must be one of .*, got 'bleu'"):
        chosen(encoder, "bleu")


def test_a_sweep_of_a_language_model(language_model):
    ids = np.random.default_rng(0).integers(0, VOCAB, (4, 12))
    steps = []
    report = measure_resilience(
        language_model,
        {"input_ids": ids},
        levels=[0.05, 0.2],
        shots=[64, "inf"],
        mitigation=["none", "zne", "repetition:3", "readout_inversion"],
        seeds=4,
        progress=lambda step, done: steps.append(done),
    )
    bundle = Bundle.open(language_model)
    logits = run(session(bundle.classical_path, library=False), ["logits"], {"input_ids": ids})[0]
    nats = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).flatten(0, 1).double(), torch.from_numpy(ids[:, 1:].ravel())
    )
    assert report.metric == {"name": "perplexity", "output": "logits", "classical": pytest.approx(float(nats.exp()))}
    assert len(report.cells) == 4 * 2 * 3
    assert steps == sorted(steps)
    assert 0.9 < steps[-1] < 1

    plain, zne, code, inverted = (by(report, m) for m in report.settings["mitigation"])
    for cells in (plain, zne, code, inverted):  # no noise and infinitely many shots: the classical model
        assert abs(cells["inf", 0.0]["loss"]["mean"]) < 1e-5
        assert cells["inf", 0.0]["attention_error"]["mean"] < 1e-5
        assert cells["inf", 0.2]["loss"]["ci95"] is None
        assert len(cells[64, 0.2]["loss"]["per_seed"]) == 4
    errors = [plain["inf", level]["attention_error"]["mean"] for level in (0.0, 0.05, 0.2)]
    assert errors == sorted(errors)
    for level in (0.05, 0.2):
        worst, *better = (cells["inf", level]["attention_error"]["mean"] for cells in (plain, zne, code))
        assert all(0 < error < worst / 2 for error in better)
        assert inverted["inf", level]["attention_error"]["mean"] < 1e-5
    # an attention's error is linear in its outcomes: 7 = 3 + 3 + 1 is what extrapolation makes of the shots' noise
    few, extrapolated = (cells[64, 0.0]["attention_error"]["mean"] for cells in (plain, zne))
    assert 5 < extrapolated / few < 9
    verdicts = {(line["mitigation"], line["shots"]): line["verdict"] for line in report.thresholds}
    assert verdicts["readout_inversion", "inf"] == ABOVE


def test_thresholds_lie_between_the_levels(encoder):
    report = measure_resilience(encoder, levels=[0.01, 0.1, 0.3], shots=["inf", 256], seeds=3, tolerance=0.01)
    exact, drawn = report.thresholds
    losses = [by(report)["inf", level]["loss"]["mean"] for level in report.settings["levels"]]
    assert report.settings["levels"] == [0.0, 0.01, 0.1, 0.3]
    assert exact["level"] == pytest.approx(crossing(report.settings["levels"], losses, 0.01))
    assert 0.01 < exact["level"] < 0.3
    low, high = drawn["level_ci95"]
    assert low < drawn["level"] < high
    worst = by(report)["inf", 0.3]["worst_site"]
    assert worst["relative_error"] >= by(report)["inf", 0.3]["attention_error"]["mean"]


def test_a_bundle_of_an_older_opset(tmp_path):
    convert(save(tmp_path), tmp_path / "bundle", opset=17, strategy="stratified")
    report = measure_resilience(tmp_path / "bundle", feeds(), levels=[0.1], shots=["inf"])
    assert (report.sites, report.left_alone) == (2, [])
    assert by(report)["inf", 0.0]["attention_error"]["mean"] < 1e-5
    assert by(report)["inf", 0.1]["attention_error"]["mean"] > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, r"seeds must be >= 1, got 0"),
        ({"tolerance": 0.0}, r"tolerance must be a positive number, .* got 0"),
        ({"shots": []}, r"shots must name at least one"),
        ({"shots": [0]}, r"shots must be >= 1, got 0"),
        ({"shots": [2**31]}, r"shots must be whole numbers from 1 to 2147483647, or inf, got 2147483648"),
        ({"shots": [True]}, r"shots must be a whole number, got True"),
        (
            {"noise": [NoiseModel("depolarizing", 0.5)]},
            r"noise has its levels from `levels` here, got depolarizing:0.5;",
        ),
        ({"noise": "depolarizing:0.1"}, r"levels from --levels here, got 'depolarizing:0.1'; write --noise depolarizing"),
        ({"noise": "depolarizing:much"}, r"noise settings must be NAME=VALUE of"),
        ({"noise": "kraus"}, r"channel must be one of depolarizing, .*, readout, got 'kraus'"),
        ({"noise": "hum"}, r"channel must be one of"),
        ({"library": False}, r"without the op library there is no noise"),
        ({"plot": "picture.txt"}, r"picture.txt: a plot ends in"),
    ],
)
def test_what_a_sweep_refuses(encoder, options, message):
    with pytest.raises(UsageError, match=message):
        measure_resilience(encoder, **options)


def test_a_model_without_attention_that_can_be_noisy(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    model = onnx.load(bundle / "classical.onnx")
    for node in [node for node in model.graph.node if node.op_type == "Attention"]:
        node.output.extend(["", "", f"{node.output[0]}.scores"])
        model.graph.output.append(onnx.ValueInfoProto(name=node.output[3]))
    onnx.save(model, bundle / "classical.onnx")
    with pytest.raises(
        QexportError, match=r"no attention that can be noisy; layer0.attention: its scores are used elsewhere"
    ):
        measure_resilience(bundle)


def test_the_command_its_table_and_its_picture(encoder, tmp_path, capsys):
    def qexport(*words):
        with pytest.raises(SystemExit) as stop:
            main(["resilience", str(encoder), *map(str, words)])
        return stop.value.code, *capsys.readouterr()

    picture = tmp_path / "found.png"
    options = ("--levels", "0.1,0.3", "--shots", "64,inf", "--seeds", "2", "--mitigation", "none,readout_inversion")
    code, out, _ = qexport(*options, "--plot", picture)
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Loss of cosine (classical: 1)" in out
    assert "How noisy may it be? A loss of 1 % or less:" in out
    assert "readout_inversion, inf shots: not within the levels swept" in out
    code, out, _ = qexport(*options, "--json")
    found = json.loads(out)
    assert (code, found["schema"], len(found["cells"])) == (0, "qexport.resilience", 2 * 2 * 3)
    found["cells"][1]["loss"] = {"mean": None, "ci95": [None, None], "per_seed": [None, None]}
    draw(found, tmp_path / "gap.svg")  # where a model gave no numbers
    assert "<!-- loss of cosine, % -->" in (tmp_path / "gap.svg").read_text()
    code, out, err = qexport("--levels", "0.1,2")
    assert (code, out) == (2, "")
    assert err.startswith("qexport: error: noise depolarizing at level 2 is refused:")
    assert err.count("\n") == 1
    code, _, err = qexport("--levels", "much")
    assert code == 2
    assert "'much' is not a list of levels" in err
