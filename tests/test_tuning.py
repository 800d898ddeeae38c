"""tune: what the probe measures, what the search returns and writes, and its errors in one line."""

import json

import numpy as np
import onnx
import pytest
from bundle_factory import HEADS, make_bundle
from click.testing import CliRunner

import qexport
from qexport.bundle import Bundle
from qexport.cli.render_tuning import show_tuning
from qexport.data import load_inputs
from qexport.errors import QexportError, UsageError
from qexport.external_data import load_structure
from qexport.feeds import Inputs
from qexport.profiling.timing import ratio
from qexport.recipe import make_recipe
from qexport.runtime import session
from qexport.tuning import measurement, tune
from qexport.tuning.output import recipe_of
from qexport.tuning.settings import EXACT, Setting
from qexport.tuning.trials import Bench, Candidate, with_settings
from qexport.validation import validate

DRAWN = Setting("stratified", (4,))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("tuning") / "b", attention={"strategy": "exact"}, sharp=1.0))


@pytest.fixture(scope="module")
def inputs(bundle):
    """Texts of unequal length, so that padding counts."""
    return load_inputs(bundle, batch=3, seq=40)


def sites_of(bundle):
    return bundle.manifest["sites"]


def test_the_probe_measures_what_validate_measures(bundle, inputs, tmp_path):
    settings = [[EXACT, DRAWN], [EXACT, DRAWN, Setting("stratified", (16, 4))]]
    tables = measurement.measure(bundle, inputs, inputs.feeds[0], sites_of(bundle), settings)
    make_bundle(tmp_path / "drawn", attention={"strategy": "stratified", "num_samples": [4]}, sharp=1.0)
    report = validate(tmp_path / "drawn", batch=3, seq=40, seeds=1)
    for table, site in zip(tables, report.sites, strict=True):
        assert table.relative_errors()[0] < 1e-6
        assert table.relative_errors()[1] == pytest.approx(site["local"]["relative_error"], rel=1e-4)
        assert (table.times > 0).all()
        assert table.errors().shape == (len(table.settings), HEADS)
    assert tables[1].errors()[2, 0] < tables[1].errors()[1, 0]
    assert tables[1].errors()[2, 1] == pytest.approx(tables[1].errors()[1, 1])


@pytest.mark.parametrize("opset", [17, 23])
def test_squares_of_three_and_of_four_axes_are_by_head(opset):
    rng = np.random.default_rng(0)
    y, x = rng.standard_normal((2, 3, HEADS, 5, 4)).astype(np.float32)
    for heads, values in ((None, (y, x)), (HEADS, (a.swapaxes(1, 2).reshape(3, 5, 8) for a in (y, x)))):
        graph = onnx.GraphProto(name="g")
        inputs = dict(zip(("y", "x"), values, strict=True))
        for name, value in inputs.items():
            graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape))
        axis = onnx.numpy_helper.from_array(np.array([-1]), measurement._squares("axis"))
        graph.initializer.append(axis)
        measurement._add_squares(graph, "y", "x", heads, opset)
        for output in graph.output:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
        import onnxruntime

        found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
        np.testing.assert_allclose(found, ((y - x) ** 2).sum(-1), rtol=1e-5)


def test_keys_are_counted(bundle, inputs):
    assert measurement.key_counts(bundle, sites_of(bundle), inputs.feeds[0]) == [40, 40]


def test_the_seeded_feeds_of_a_probe_are_the_largest(bundle):
    feeds = [{"input_ids": np.ones((1, n), np.int64), "attention_mask": np.ones((1, n), np.int64)} for n in (3, 9, 6)]
    bench = Bench(bundle, sites_of(bundle), Inputs(feeds, "test"), feeds[1], 1, None)
    assert bench.largest_feeds(2) == [1, 2]


def test_candidates_are_tried_with_their_settings(bundle, inputs):
    bench = Bench(bundle, sites_of(bundle), inputs, inputs.feeds[0], seeds=3, threads=1)
    exact, drawn = Candidate("e", (EXACT, EXACT)), Candidate("d", (EXACT, DRAWN))
    for candidate in (exact, drawn):
        bench.try_error(candidate)
    assert exact.error < 1e-5 < 0.01 < drawn.error
    assert exact.error_ci95 is None
    low, high = drawn.error_ci95
    assert low < drawn.error < high
    bench.try_time([exact, drawn], rounds=6)
    assert exact.ratio["of_medians"] > 0
    assert exact.latency_ms > 0


def test_what_is_written_is_what_was_found(bundle, tmp_path):
    report = tune(bundle, max_error=0.2, batch=2, seq=60, trials=6, output=tmp_path / "tuned", threads=1)
    assert report.passed
    assert report.best["error"] <= 0.2
    assert {c["label"] for c in report.candidates} >= {"exact", "default recipe"}
    assert len(report.candidates) <= 6
    tuned = Bundle.open(tmp_path / "tuned", verify=True)
    recipe = make_recipe(report.recipe)
    nodes = [n for n in load_structure(tuned.model_path).graph.node if n.op_type == "QuantumAttention"]
    for node, site in zip(nodes, tuned.manifest["sites"], strict=True):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for key, value in recipe.resolve(site["module"], site["name"]).items():
            on_node = attributes[key].decode() if isinstance(attributes[key], bytes) else attributes[key]
            wanted = list(value) if isinstance(value, tuple) else value
            if key != "num_samples" or site["strategy"] != "exact":
                assert on_node == pytest.approx(wanted) if isinstance(wanted, float) else on_node == wanted
                assert site[key] == wanted
    checked = validate(tuned, batch=2, seq=60, seeds=3, max_error=0.2)
    assert checked.passed
    worst = max(metrics["relative_error"] for metrics in checked.outputs["library"].values())
    assert worst == pytest.approx(report.best["error"], rel=0.02, abs=1e-5)
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_fastest_are_timed_once_more_and_together(bundle, monkeypatch):
    """The first times put the candidates in one order, the last ones in another, which counts."""
    groups = []

    def try_time(bench, candidates, rounds):
        groups.append([c.label for c in candidates])
        for i, c in enumerate(candidates if len(groups) == 1 else reversed(candidates)):
            c.latency_ms, c.ratio = 1.0 + i, {"of_rounds": {"p50": 1.0 + i}, "median_ci95": None}

    monkeypatch.setattr(Bench, "try_time", try_time)
    report = tune(bundle, max_error=0.3, batch=2, seq=60, trials=7, threads=1)
    within = [c["label"] for c in report.candidates if c["within"]]
    assert len(groups[0]) == len(report.candidates)
    assert len(groups[1]) > 1
    assert groups[1] == within[:4]
    assert report.best["label"] == groups[1][-1]


def test_the_ratio_that_is_shown_and_judged_lies_in_its_interval(bundle, monkeypatch, capsys):
    """On a machine that slows down half-way the medians of the models may be of different halves."""
    drift = np.repeat([1.0, 2.0], [10, 11])
    times = {"classical": drift, "ours": np.where(np.arange(21) == 10, 1.0, drift) * 0.9}
    found = ratio(times["ours"], times["classical"])
    assert not found["median_ci95"][0] <= found["of_medians"] <= found["median_ci95"][1]

    def try_time(bench, candidates, rounds):
        for c in candidates:
            c.latency_ms, c.ratio = 1.0, found

    monkeypatch.setattr(Bench, "try_time", try_time)
    report = tune(bundle, max_error=0.3, batch=2, seq=60, trials=2, threads=1)
    show_tuning(report, verbose=False)
    shown = capsys.readouterr().out
    assert "0.90 x   0.90 to 0.90" in shown
    assert "1.11 times as fast as the classical model (95 %: 1.11 to 1.11)\n" in shown


def test_a_tolerance_below_rounding_is_said_to_be_out_of_reach(bundle, tmp_path):
    report = tune(bundle, max_error=1e-12, trials=3, output=tmp_path / "tuned")
    assert not report.passed
    assert "1e-12" in report.reasons[0]
    assert f"{report.best['error']:.2g}" in report.reasons[0]
    assert report.best["error"] == min(c["error"] for c in report.candidates)
    assert list(tmp_path.iterdir()) == []


def test_no_trial_begins_after_the_time_is_up(bundle):
    report = tune(bundle, max_error=0.1, time=1e-6)
    assert report.trials == 1
    assert report.passed


def test_progress_never_goes_back(bundle):
    steps = []
    tune(bundle, max_error=0.1, trials=4, progress=lambda step, done: steps.append((done, step)))
    shares = [done for done, _ in steps]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert any("trying recipe 1" in step for _, step in steps)


def test_the_recipe_names_the_common_setting_once(bundle):
    sites = sites_of(bundle)
    both = recipe_of(bundle, sites, (DRAWN, DRAWN))
    assert both == {"strategy": "stratified", "num_samples": 4, "seed": 0}
    mixed = recipe_of(bundle, [*sites, *sites[:1]][:2], (DRAWN, EXACT))
    assert mixed["strategy"] == "stratified"
    assert mixed["layers"] == [{"match": "encoder.1.attention", "strategy": "exact", "precision": "fp32"}]


def test_a_site_that_cannot_be_watched_keeps_its_recipe(bundle):
    recipe = recipe_of(bundle, sites_of(bundle)[:1], (DRAWN,))
    resolved = [make_recipe(recipe).resolve(f"encoder.{i}.attention", "")["strategy"] for i in (0, 1)]
    assert resolved == ["stratified", "exact"]


def test_names_are_matched_to_the_letter(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "b"))
    bundle.manifest["sites"][0]["module"] = "blocks[0].*"
    recipe = make_recipe(recipe_of(bundle, sites_of(bundle), (EXACT, DRAWN)))
    assert recipe.resolve("blocks[0].*", "")["strategy"] == "exact"
    assert recipe.resolve("encoder.1.attention", "")["strategy"] == "stratified"
    assert recipe.layers[0].match != "*"


def test_only_the_sites_change(bundle):
    before, after = load_structure(bundle.model_path), with_settings(bundle, sites_of(bundle), (DRAWN, EXACT))

    def values(node):
        return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name != "num_samples"}

    changed = [a.name for a, b in zip(before.graph.node, after.graph.node, strict=True) if values(a) != values(b)]
    assert changed == ["layer0.attention"]


@pytest.mark.parametrize(
    "options",
    [
        *({"max_error": value} for value in (0.0, 1.5, float("nan"))),
        {"trials": 0},
        {"seeds": 0},
        {"threads": 0},
        {"time": 0.0},
    ],
)
def test_wrong_arguments(bundle, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        tune(bundle, **{"max_error": 0.1} | options)


def test_output_is_checked_before_anything_is_measured(bundle, tmp_path):
    (tmp_path / "mine.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds no bundle"):
        tune(bundle, max_error=0.1, output=tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        tune(bundle, max_error=0.1, output=tmp_path / "nowhere" / "recipe.yaml")
    for place in (bundle.path, bundle.path / ".." / "b"):
        with pytest.raises(UsageError, match="is made from what is there; choose another folder"):
            tune(bundle, max_error=0.1, output=place)
    for name in ("out.json", "model.ONNX"):
        with pytest.raises(UsageError, match=r"a recipe goes to a .yaml file, a bundle to a folder.*; name it .*\.yaml, or"):
            tune(bundle, max_error=0.1, output=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(QexportError, match="no such data file"):
        tune(bundle, "nothing.txt", max_error=0.1)


def test_the_command(bundle, tmp_path):
    from qexport.cli import cli

    recipe = tmp_path / "recipe.yaml"
    run = CliRunner().invoke(cli, ["tune", str(bundle.path), "--max-error", "0.2", "--trials", "3", "-o", str(recipe)])
    assert run.exit_code == 0, run.output
    assert "BEST" in run.output
    assert f"--config {recipe}" in run.output
    assert make_recipe(recipe).to_dict()
    run = CliRunner().invoke(cli, ["tune", str(bundle.path), "--max-error", "1e-12", "--trials", "2", "--json"])
    assert run.exit_code == 3
    assert json.loads(run.stdout)["passed"] is False


def test_tune_is_a_function_of_the_package(bundle):
    assert qexport.tune is tune
    assert session(bundle.path).get_inputs()
