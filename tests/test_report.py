"""qexport report: what it gathers, what the page says of it, and what is wrong with a call."""

import copy
import html
import json
import re
import shlex
from importlib import import_module

import click
import pytest
from bundle_factory import make_bundle
from cli_cases import assert_one_line

from qexport import QexportError, UsageError, inspect
from qexport.bundle import Bundle
from qexport.cli import COMMANDS, cli
from qexport.providers import recorded
from qexport.recipe import load_recipe
from qexport.reporting import parts as parts_module
from qexport.reporting import report
from qexport.reporting.commands import making, reproduce
from qexport.reporting.page import page as page_of
from qexport.words import error_text, percent

PARTS = {"validate", "profile", "samples", "scaling", "inspect", "doctor"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    # a folder whose name would break a page that does not escape it
    return make_bundle(tmp_path_factory.mktemp("report") / "b&<b>'\"", layers=2)


@pytest.fixture(scope="module")
def made(bundle, tmp_path_factory):
    """(report, page) with everything in it."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parts_module.SWEEP, "lengths", (16, 32, 64))
        found = report(bundle, file, runs=8, seq=(8, 16, 32), seeds=4, max_error=2.0, threads=1)
    return found, file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measured(made, tmp_path_factory):
    """The report's own JSON, as --json prints it."""
    file = tmp_path_factory.mktemp("json") / "report.json"
    file.write_text(json.dumps(made[0].to_dict(), allow_nan=False))
    return file


def charts(page: str) -> dict[str, dict]:
    """Title of each chart to what is drawn."""
    found = [json.loads(html.unescape(text)) for text in re.findall(r'data-chart="([^"]*)"', page)]
    return {chart["title"]: chart for chart in found}


def visible(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "\n", page))


def test_every_part_is_there(made):
    found, _ = made
    assert set(found.parts) == PARTS
    assert found.missing == {}
    assert found.passed is True
    for name in PARTS - {"doctor"}:
        assert found.parts[name]["schema"] == f"qexport.{name}"


def test_the_page_needs_nothing_else(made):
    _, page = made
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not re.findall(r"<(?:link|img|iframe|object)|\ssrc=|@import|url\(", page)


def test_names_are_escaped(made, bundle):
    _, page = made
    assert "<b>" not in page
    assert bundle.name in visible(page)


def test_the_verdict_comes_first(made):
    found, page = made
    words = visible(page.split("<main>")[1])
    assert words.index("Passed") < words.index(found.headline) < words.index("Accuracy, layer by layer")
    metrics = found.parts["validate"]["outputs"]["library"]["hidden"]
    assert f"within 200 % of the classical model's: {percent(metrics['relative_error'])} at hidden." in found.headline


def test_accuracy_is_what_validate_found(made):
    found, page = made
    chart = charts(page)["Error of each attention"]
    for row, site in zip(chart["rows"], found.parts["validate"]["sites"], strict=True):
        assert row["label"] == site["module"]
        own, propagated = row["values"]
        assert own == [100 * x for x in (site["local"]["relative_error"], *site["local"]["relative_error_ci95"])]
        assert propagated[0] == 100 * site["propagated"]["relative_error"]
        assert error_text(site["local"]) in visible(page)


def test_error_falls_with_the_samples(made):
    """Of twelve keys and what samples them one by one; hybrid and tree know more, tree reads all at this length."""
    found, page = made
    chart = charts(page)["Error of an attention against its samples"]
    lines = {series["name"]: series["points"] for series in chart["series"]}
    assert {"stratified", "adaptive", "naive", "hybrid"} <= set(lines)
    assert [point[0] for point in lines["stratified"]] == [4, 8]
    assert lines["stratified"][0][1] > lines["stratified"][1][1]
    errors = [
        entry["relative_error"]
        for site in found.parts["samples"]["sites"]
        for entry in site["measured"]
        if entry["setting"] == {"strategy": "naive", "num_samples": 8}
    ]
    assert lines["naive"][1] == [8, *(pytest.approx(100 * x) for x in (sum(errors) / 2, min(errors), max(errors)))]


def test_latency_ops_and_memory_are_what_profile_found(made):
    found, page = made
    drawn, timed = charts(page), found.parts["profile"]
    latency = {series["name"]: series["points"] for series in drawn["Time of a run, batch 1"]["series"]}
    assert len(latency) == 6
    for which in ("classical", "converted"):
        for p in ("p50", "p90", "p99"):
            expected = [[s["sequence"], s["models"][which]["latency_ms"][p]] for s in timed["sizes"]]
            assert latency[f"{which}, {p}"] == expected
    last = timed["sizes"][-1]["models"]
    ops = drawn["Time by op, batch 1, length 32"]
    spent = {row["label"]: row["values"] for row in ops["rows"]}
    assert spent["QuantumAttention"][0] is None
    assert spent["QuantumAttention"][1] == [
        sum(op["time_us"] for op in last["converted"]["ops"] if op["op"] == "QuantumAttention")
    ]
    memory = drawn["Resident memory of a process that loads the model and runs it"]
    for series in memory["series"]:
        found_memory = last[series["name"]]["memory"]
        assert series["points"][-1][0] <= found_memory["timeline"]["done"]
        assert max(y for _, y in series["points"]) <= found_memory["peak_bytes"] / 1e6 * 1.01


def test_reused_files_are_not_measured_again(made, measured, bundle, tmp_path, monkeypatch):
    for module, name in (
        ("qexport.validation", "validate"),
        ("qexport.profiling", "profile"),
        ("qexport.tuning.samples", "error_by_samples"),
        ("qexport.scaling", "sweep"),
    ):
        monkeypatch.setattr(import_module(module), name, lambda *_, **__: pytest.fail("measured again"))
    again = report(bundle, tmp_path / "again.html", reuse=[measured])
    assert again.parts == made[0].parts
    assert charts((tmp_path / "again.html").read_text()) == charts(made[1])


def test_what_is_skipped_says_how_to_make_it(bundle, tmp_path, qexport):
    code, out, err = qexport("report", bundle, "-o", tmp_path / "r.html", "--skip", "all")
    assert code == 0, err
    assert "NOT CHECKED" in out
    words = visible((tmp_path / "r.html").read_text())
    assert "Not checked" in words
    quoted = shlex.quote(str(bundle))
    for command in (f"qexport validate {quoted} --json", f"qexport profile {quoted}", "qexport scaling --json"):
        assert command in words
    assert words.count("No data: it was skipped") == 6


def test_data_is_looked_at_though_nothing_reads_it(bundle, tmp_path):
    with pytest.raises(QexportError, match=r"absent\.txt: no such data file"):
        report(bundle, tmp_path / "r.html", tmp_path / "absent.txt", skip=["all"])
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(QexportError, match=r"data\.csv: unknown kind of data"):
        report(bundle, tmp_path / "r.html", tmp_path / "data.csv", skip=["all"])
    assert not (tmp_path / "r.html").exists()


def parsed_options(name, words):
    """What a command makes of its words, within `qexport`: click keeps the names of --help that it first saw."""
    group = click.Context(cli, **cli.context_settings)
    return cli.get_command(group, name).make_context(name, words, parent=group).params


def test_the_commands_of_the_page_are_valid(made, bundle):
    """Each parses, and those with settings have those of the documents."""
    block = made[1].split('id="reproduce"')[1]
    lines = [html.unescape(line) for line in re.findall(r"<span>(.*?)</span>", block)]
    commands = [shlex.split(line.split(" > ")[0])[1:] for line in lines if line.startswith("qexport ")]
    assert [words[0] for words in commands] == ["convert", "validate", "profile", "scaling", "report"]
    parsed = {}
    for name, *words in commands:
        assert name in COMMANDS
        parsed[name] = parsed_options(name, words)
    assert parsed["profile"]["seq"] == (8, 16, 32)
    assert (parsed["profile"]["runs"], parsed["profile"]["threads"]) == (8, 1)
    assert (parsed["validate"]["seeds"], parsed["validate"]["max_error"]) == (4, 2.0)
    assert (parsed["scaling"]["heads"], parsed["scaling"]["head_size"]) == (2, 8)
    assert parsed["report"]["bundle"] == str(bundle)


COMPRESSED = {"settings": {"ratio": 3.0}, "metric": {"name": "top1"}}
FITTED = {"source": "40 texts of texts.txt", "batch": 4, "seq": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"convert": {"opset": None, "task": None, "dtype": None, "kv_cache": None}}),
        ({"opset": 22, "source": {"kind": "huggingface", "name": "m", "task": "causal-lm", "dtype": "float16"}},
         {"convert": {"opset": 22, "task": "causal-lm", "dtype": "float16"}}),
        ({"opset": 24, "kv_cache": {"length": 48}}, {"convert": {"opset": None, "kv_cache": 48}}),
        ({"compression": COMPRESSED | {"of_bundle": False, "data": FITTED}},
         {"compress": {"data": "texts.txt", "batch": 4, "seq": None, "metric": "top1", "config": "recipe.yaml"}}),
        ({"opset": 20, "compression": COMPRESSED | {"of_bundle": True, "data": FITTED | {"source": "stored samples"}}},
         {"convert": {"output": "converted", "opset": 20, "config": "attention.yaml"},
          "compress": {"model": "converted", "data": None, "config": "compress.yaml"}}),
    ],
)  # fmt: skip
def test_the_commands_make_the_same_model(made, bundle, changes, expected):
    """With the options that the model was converted and compressed with."""
    lines = reproduce(made[0].to_dict(), Bundle.open(bundle).manifest | changes).split("\n")
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("qexport ")]
    makers = {name: parsed_options(name, words) for name, *words in commands if name in ("convert", "compress")}
    assert makers.keys() == expected.keys()
    for name, options in expected.items():
        assert {key: makers[name][key] for key in options} == options


def test_the_commands_ask_for_the_same_providers(made, bundle):
    found, manifest = copy.deepcopy(made[0].to_dict()), Bundle.open(bundle).manifest
    for document in (found, *(found["parts"][name] for name in ("validate", "profile", "scaling"))):
        assert document["settings"]["providers"] == ["CPUExecutionProvider"]
        document["settings"] |= recorded(["cuda"], allow_fallback=True)
    missing = [making(part, found, manifest) for part in parts_module.MEASURED]
    lines = [line for line in "\n".join(missing).split("\n") if "--reuse" not in line]
    lines += reproduce(found, manifest).split("\n")
    commands = [shlex.split(line.split(" > ")[0])[1:] for line in lines if line.startswith("qexport ")]
    asked = [words for words in commands if words[0] != "convert"]
    assert len(asked) == 8
    for name, *words in asked:
        params = parsed_options(name, words)
        assert (params["providers"], params["allow_fallback"]) == (["CUDAExecutionProvider"], True), name


def test_a_failure_is_told_and_the_page_is_written(bundle, tmp_path, qexport):
    code, out, _ = qexport("report", bundle, "-o", tmp_path / "r.html", "--max-error", "1e-9", "--seeds", "2",
                           *("--skip", "profile", "--skip", "samples", "--skip", "scaling"))  # fmt: skip
    assert code == 3
    assert "FAILED: output 'hidden' with the library" in out
    words = visible((tmp_path / "r.html").read_text())
    assert "Failed" in words
    assert "more than the 1.0e-09 allowed" in words


def test_a_changed_file_fails(tmp_path, measured):
    changed = make_bundle(tmp_path / "bundle")
    (changed / "test_data_set_0" / "output_0.pb").write_bytes(b"changed")
    found = report(changed, tmp_path / "r.html", reuse=[measured])
    assert found.passed is False
    assert "1 file changed since the bundle was written: test_data_set_0/output_0.pb" in found.reasons
    assert any("comes from report.json, which was made of" in note for note in found.notes)


@pytest.mark.parametrize("part", ["validate", "profile"])
def test_figures_of_a_model_that_was_replaced_are_not_reused(bundle, tmp_path, measured, part):
    """In the same folder, with the same attentions: only the files tell, be it that of other weights."""
    document = json.loads(measured.read_text())["parts"][part]
    measured_on = Bundle.open(bundle)
    assert document["model_sha256"] == measured_on.model_sha256
    measured_on.manifest["files"]["model.onnx.data"] = {"sha256": "0" * 64}
    assert document["model_sha256"] != measured_on.model_sha256
    (tmp_path / "old.json").write_text(json.dumps(document))
    again = make_bundle(tmp_path / "again", attention={"strategy": "naive", "num_samples": [4]})
    with pytest.raises(UsageError, match=r"old\.json: was measured on another model than"):
        report(again, tmp_path / "r.html", reuse=[tmp_path / "old.json"])


def test_a_part_that_does_not_fit_the_bundle_is_missing_with_its_reason(bundle, tmp_path, monkeypatch, measured):
    def fail(*_, **__):
        raise QexportError("no attention can be measured")

    document = json.loads(measured.read_text())
    del document["parts"]["samples"]
    (tmp_path / "r.json").write_text(json.dumps(document))
    monkeypatch.setattr("qexport.tuning.samples.error_by_samples", fail)
    found = report(bundle, tmp_path / "r.html", reuse=[tmp_path / "r.json"])
    assert found.missing == {"samples": "no attention can be measured"}
    assert "No data: no attention can be measured." in visible((tmp_path / "r.html").read_text())


def test_tune_has_samples_too(bundle, tmp_path, measured):
    """Budgets of another precision are lines of their own; settings with a tolerance are none."""
    document = json.loads(measured.read_text())
    tuned = document["parts"].pop("samples")
    settings = [
        {"strategy": "tree", "precision": "bf16", "num_samples": 16, "error_tolerance": 0.0, "residual": "verify_only"},
        {"strategy": "tree", "precision": "int8", "num_samples": 16, "error_tolerance": 0.0, "residual": "verify_only"},
        {"strategy": "tree", "precision": "bf16", "num_samples": 16, "error_tolerance": 0.1, "residual": "verify_only"},
        {"strategy": "exact", "precision": "fp32"},
    ]
    for site in tuned["sites"]:
        site["measured"] = [{"setting": s, "relative_error": 0.1 * (i + 1), "time_us": 1.0} for i, s in enumerate(settings)]
    (tmp_path / "tune.json").write_text(json.dumps(tuned | {"schema": "qexport.tune"}))
    (tmp_path / "rest.json").write_text(json.dumps(document))
    report(bundle, tmp_path / "r.html", reuse=[tmp_path / "rest.json", tmp_path / "tune.json"])
    chart = charts((tmp_path / "r.html").read_text())["Error of an attention against its samples"]
    points = {series["name"]: series["points"] for series in chart["series"]}
    assert points == {"tree, bf16": [[16, 10, 10, 10]], "tree, int8": [[16, 20, 20, 20]]}


def test_wrong_calls_are_one_line(bundle, tmp_path, qexport, measured):
    (tmp_path / "no.json").write_text("nothing")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "stranger.json").write_text('{"a": 1}')
    (tmp_path / "new.json").write_text('{"schema": "qexport.profile", "schema_version": 9}')
    (tmp_path / "half.json").write_text('{"schema": "qexport.profile", "schema_version": 1, "sizes": []}')
    (tmp_path / "inspect.json").write_text(json.dumps(inspect(bundle)))
    document = json.loads(measured.read_text())["parts"]["validate"]
    document["sites"][0]["module"] = "another.attention"
    (tmp_path / "other.json").write_text(json.dumps(document))
    page = tmp_path / "r.html"
    usage = {
        "an .html file": ("-o", tmp_path / "r.txt"),
        "there is no folder": ("-o", tmp_path / "none" / "r.html"),
        "a report shows nothing": ("-o", page, "--reuse", tmp_path / "inspect.json"),
        "'another.attention' is not in": ("-o", page, "--reuse", tmp_path / "other.json"),
        "was given before": ("-o", page, "--reuse", measured, "--reuse", measured),
    }
    failures = {
        "cannot be read": "absent.json",
        "not a JSON document": "no.json",
        "holds no JSON object": "list.json",
        "no report of qexport": "stranger.json",
        "schema_version 9": "new.json",
        "half.json: a part is damaged": "half.json",
    }
    cases = [(words, options, 2) for words, options in usage.items()]
    cases += [(words, ("-o", page, "--reuse", tmp_path / name, "--skip", "all"), 1) for words, name in failures.items()]
    for words, options, expected in cases:
        assert_one_line(*qexport("report", bundle, *options), words, expected=expected)
        assert not page.exists()
    with pytest.raises(UsageError, match="no part 'memory'"):
        report(bundle, page, skip=["memory"])
    code, _, err = qexport("report", tmp_path / "nowhere", "-o", page)
    assert (code, err.count("\n")) == (1, 1)


def test_compressed_weights_are_told(made, bundle, tmp_path):
    found, _ = made
    manifest = json.loads((bundle / "manifest.json").read_text())
    settings = {"ratio": 8.0, "max_drop": None, "methods": ["int8"], "heal": 0, "layers": []}
    manifest["compression"] = {
        "settings": settings,
        "size": {"before": 8_000_000, "after": 1_000_000, "ratio": 8.0},
        "metric": {"name": "cosine", "loss": 0.017},
        "layers": [{"name": "w", "module": "pooler", "method": "rank 272, int4"}],
    }
    found = found.to_dict() | {"parts": found.parts | {"inspect": found.parts["inspect"] | manifest}}
    words = visible(page_of(found, manifest))
    assert "8.00 MB became 1.00 MB, 8.00 times smaller, at a loss of 1.7 % of cosine" in words
    assert "rank 272, int4" in words
    recipe = words.split("recipe.yaml, what is not named has its default:")[1].split("opset")[0]
    (tmp_path / "recipe.yaml").write_text(re.sub(r"\n+", "\n", recipe))
    assert load_recipe(tmp_path / "recipe.yaml").compress.ratio == 8
    assert "qexport compress" in words
