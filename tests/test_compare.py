"""qexport compare: what counts as worse, what is noise, and what cannot be compared."""

import copy
import json
import math

import numpy as np
import pytest
from bundle_factory import make_bundle
from cli_cases import assert_one_line

from qexport import compare, compress, inspect, measure_resilience, profile, sweep, tune, validate
from qexport.comparison import BETTER, NOISE, SAME, UNJUDGED, WORSE, judge
from qexport.comparison.figures import Figure
from qexport.documents import make_document
from qexport.errors import UsageError
from qexport.validation.statistics import t_quantile


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents of a real bundle, by their schema."""
    bundle = make_bundle(tmp_path_factory.mktemp("compare") / "bundle")
    checked = validate(bundle, max_error=2.0, seeds=6).to_dict()
    timed = profile(bundle, runs=8, seq=(8, 16), threads=1).to_dict()
    for size in timed["sizes"]:
        for model in size["models"].values():  # whatever else this machine does
            model["latency_ms"] = {"p50": 1.0, "p90": 1.2, "p99": 1.3, "mean": 1.0, "min": 0.9, "max": 1.4}
    return json.loads(json.dumps({"validate": checked, "profile": timed, "inspect": inspect(bundle)}))


@pytest.fixture
def write(tmp_path):
    """Writes a document, changed by a function, to a file."""

    def write(name, document, change=None):
        document = copy.deepcopy(document)
        if change:
            change(document)
        (tmp_path / name).write_text(json.dumps(document))
        return tmp_path / name

    return write


def verdicts(found) -> dict[str, str]:
    return {figure["name"]: figure["verdict"] for figure in found.figures if figure["verdict"] != SAME}


def scaled(metrics: dict, factor: float) -> None:
    metrics["relative_error"] *= factor
    metrics["relative_error_ci95"] = [factor * end for end in metrics["relative_error_ci95"]]


def figure(value, interval=None, **options):
    return Figure(value, "errors", "share", interval, **options)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (figure(1.0), figure(1.0), SAME),
        (figure(1.0), figure(1.2), WORSE),
        (figure(1.0), figure(0.8), BETTER),
        (figure(1.0), figure(1.04), NOISE),  # below the threshold of 5 %
        (figure(1.0, [0.9, 1.1]), figure(1.2, [1.05, 1.35]), NOISE),  # the intervals meet
        (figure(1.0, [0.9, 1.1]), figure(1.2, [1.15, 1.25]), WORSE),
        (figure(1.0, [0.9, 1.1]), figure(0.8, [0.75, 0.85]), BETTER),
        (figure(1.0, lower_is_better=False), figure(0.8, lower_is_better=False), WORSE),
        (figure(1e-7, floor=1e-5), figure(9e-6, floor=1e-5), NOISE),  # rounding
        (figure(1.0), figure(None), WORSE),
        (figure(None), figure(1.0), BETTER),
        (figure(None), figure(None), SAME),
        (figure(0.0), figure(0.1), WORSE),
    ],
)
def test_the_rule(old, new, expected):
    assert judge(old, new, 0.05) == expected


def test_few_false_alarms_and_real_changes_are_seen():
    """Errors of six seeds with 10 % noise. Without a change, WORSE in at most 1 % of the pairs: the intervals of two equal
    means stay apart in about .5 % (Student's t, five degrees of freedom), half of it each way. The count's bound is the
    binomial distribution's, at 5 standard deviations. A change by half is seen nearly always."""
    rng, pairs = np.random.default_rng(0), 3000
    factor = t_quantile(0.975, 5) / math.sqrt(6)

    def drawn(mean):
        values = mean * (1 + 0.1 * rng.standard_normal(6))
        middle, half = float(values.mean()), float(factor * values.std(ddof=1))
        return figure(middle, [middle - half, middle + half])

    alarms = sum(judge(drawn(1.0), drawn(1.0), 0.0) == WORSE for _ in range(pairs))
    assert alarms <= 0.01 * pairs + 5 * math.sqrt(0.01 * 0.99 * pairs)
    seen = sum(judge(drawn(1.0), drawn(1.5), 0.05) == WORSE for _ in range(300))
    assert seen >= 285


def test_nothing_changed(write, documents, qexport):
    for name, document in documents.items():
        file = write(f"{name}.json", document)
        code, out, err = qexport("compare", file, file)
        assert code == 0, err
        assert "PASSED: nothing is worse" in out
        assert "not judged" not in out
        assert set(verdicts(compare(file, file))) == set()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark(write, documents, encoding):
    """PowerShell writes what a command printed in one of these."""
    before = write("a.json", documents["inspect"])
    after = before.with_name("b.json")
    after.write_text(before.read_text(), encoding=encoding)
    assert {figure["verdict"] for figure in compare(before, after).figures} == {SAME}


def test_every_kind_of_document(write, tmp_path):
    """What the other commands print has figures, and does not change by being compared with itself."""
    bundle = make_bundle(tmp_path / "bundle", hidden=512)  # with weights worth compressing
    made = {
        "scaling": (
            sweep((16, 32), heads=1, head_size=8, strategies=["exact", "naive"], seconds=60.0),
            "error of naive 32, length 32",
        ),
        "tune": (tune(bundle, max_error=0.1, trials=2, seeds=2, threads=1), "time ratio of the best recipe"),
        "compress": (compress(bundle, tmp_path / "small", ratio=1.5, batch=8, seq=8, profile=False), "loss of cosine"),
        "resilience": (
            measure_resilience(bundle, levels=(0.0, 0.5), shots=(16,), seeds=2),
            "loss of none, 16 shots, level 0.5",
        ),
    }
    for kind, (found, name) in made.items():
        file = write(f"{kind}.json", found.to_dict())
        figures = {figure["name"]: figure for figure in compare(file, file).figures}
        assert figures[name]["before"] is not None, kind
        assert {figure["verdict"] for figure in figures.values()} == {SAME}


def test_resilience_of_other_noise_is_another_question(write, tmp_path, qexport):
    """And a loss below 0 is written as what it is."""
    bundle = make_bundle(tmp_path / "bundle")
    one, other = (
        measure_resilience(bundle, noise=noise, levels=(0.1,), shots=(16,), seeds=2).to_dict()
        for noise in ("depolarizing", "bit_flip")
    )
    with pytest.raises(UsageError, match="noise"):
        compare(write("a.json", one), write("b.json", other))

    def gained(document):
        document["cells"][1]["loss"] |= {"mean": -0.0014, "ci95": [-0.0041, 0.0013]}

    code, out, _ = qexport("compare", write("a.json", one, gained), write("b.json", one), "-v")
    assert (code, "-0.14 % (-0.41 % to 0.13 %)" in out) == (3, True)
    strict = write("c.json", one, lambda document: document["settings"].update(tolerance=0.5))
    names = {figure["name"] for figure in compare(strict, strict).figures}
    assert not any("threshold" in name and "loss 1 %" in name for name in names)


def test_a_larger_error_is_worse(write, documents, qexport):
    a = write("a.json", documents["validate"])
    b = write("b.json", documents["validate"], lambda d: scaled(d["outputs"]["library"]["hidden"], 3))
    assert verdicts(compare(a, b)) == {"error of output hidden": WORSE}
    assert verdicts(compare(b, a)) == {"error of output hidden": BETTER}
    code, out, _ = qexport("compare", a, b)
    assert code == 3
    assert "FAILED: error of output hidden is worse" in out
    code, out, _ = qexport("compare", a, b, "--threshold", "300%", "--json")
    assert code == 0
    assert json.loads(out)["figures"][1]["verdict"] == NOISE
    assert qexport("compare", b, a)[0] == 0


def test_what_compressed_weights_may_lose_is_no_rounding(write, documents, qexport):
    """Their limit without the library is 1.5 times their loss, which hides no loss of another file."""

    def compressed(d):
        d["max_error"] |= {"fallback": 10.0, "sites": None}
        scaled(d["outputs"]["library"]["hidden"], 30)

    a, b = write("a.json", documents["validate"]), write("b.json", documents["validate"], compressed)
    assert verdicts(compare(a, b)) == {"error of output hidden": WORSE}
    assert " 30 x " in qexport("compare", a, b)[1]  # and not +2900.0 %


def test_an_error_within_its_interval_is_noise(write, documents):
    a = write("a.json", documents["validate"])
    metrics = documents["validate"]["outputs"]["library"]["hidden"]
    half = (metrics["relative_error_ci95"][1] - metrics["relative_error_ci95"][0]) / 2
    b = write(
        "b.json",
        documents["validate"],
        lambda d: scaled(d["outputs"]["library"]["hidden"], 1 + half / metrics["relative_error"]),
    )
    assert verdicts(compare(a, b, threshold=0.0)) == {"error of output hidden": NOISE}


def test_a_verdict_that_fails_is_worse_whatever_the_threshold(write, documents):
    a = write("a.json", documents["validate"])
    b = write("b.json", documents["validate"], lambda d: d.update(passed=False))
    assert verdicts(compare(a, b, threshold=5.0)) == {"passed": WORSE}


def slower(model: dict, factor: float) -> None:
    model["latency_ms"] = {name: factor * value for name, value in model["latency_ms"].items()}


def test_times(write, documents):
    """Ten times slower is worse; with the classical model, the machine is slower; on another one nothing is judged."""
    timed = documents["profile"]
    a = write("a.json", timed)

    def ours(d):
        slower(d["sizes"][0]["models"]["converted"], 10)

    def both(d):
        for model in d["sizes"][0]["models"].values():
            slower(model, 10)

    name = "time of the converted model, batch 1, length 8"
    control = "time of the classical model, batch 1, length 8"
    assert verdicts(compare(a, write("b.json", timed, ours))) == {name: WORSE}
    found = compare(a, write("c.json", timed, both))
    assert verdicts(found) == {name: UNJUDGED, control: UNJUDGED}
    assert f"{name} is not judged: {control}, which measures the machine, changed as well" in found.notes

    def elsewhere(d):
        ours(d)
        d["machine"]["processor"] = "another"

    found = compare(a, write("d.json", timed, elsewhere))
    assert verdicts(found) == {name: UNJUDGED}
    assert found.notes[0].startswith("times of profile are not judged: ")


def test_a_ratio_is_judged_by_its_interval(write, documents):
    a = write("a.json", documents["profile"], lambda d: ratio(d, 1.0, 0.1))
    name = "time ratio, batch 1, length 8"
    assert verdicts(compare(a, write("b.json", documents["profile"], lambda d: ratio(d, 1.15, 0.1)))) == {name: NOISE}
    assert verdicts(compare(a, write("b.json", documents["profile"], lambda d: ratio(d, 1.25, 0.1)))) == {name: WORSE}


def ratio(document, median, half):
    document["sizes"][0]["ratio"] = {
        "of_medians": median,
        "of_rounds": {"p25": median - half, "p50": median, "p75": median + half},
        "median_ci95": [median - half, median + half],
    }


def test_memory_and_size(write, documents):
    def larger(d):
        d["sizes"][1]["models"]["converted"]["memory"]["peak_bytes"] *= 2

    a = write("a.json", documents["profile"])
    found = verdicts(compare(a, write("b.json", documents["profile"], larger)))
    assert found == {"peak memory of the converted model, batch 1, length 16": WORSE}
    a = write("a.json", documents["inspect"])
    b = write("b.json", documents["inspect"], lambda d: d.update(file_bytes=2 * d["file_bytes"], nodes=d["nodes"] + 1))
    assert verdicts(compare(a, b)) == {"size of the model's file": WORSE, "nodes": UNJUDGED}


def test_documents_within_documents(write, documents):
    """As report and demo print them; what one has alone is told."""
    a = write("a.json", make_document("demo", {"validation": documents["validate"], "profile": documents["profile"]}))
    b = write("b.json", make_document("report", {"parts": {"validate": documents["validate"]}}))
    found = compare(a, b)
    assert {figure["part"] for figure in found.figures} == {"validate"}
    assert f"profile is in {a} alone" in found.notes


def test_what_cannot_be_compared_is_one_line(write, documents, qexport):
    checked, timed = write("v.json", documents["validate"]), write("p.json", documents["profile"])

    def renamed(d):
        d["outputs"]["fallback"]["logits"] = d["outputs"]["fallback"].pop("hidden")

    def other_graph(d):
        d["sizes"][0]["models"]["classical"]["ops"][0]["nodes"] += 1

    def other_sizes(d):
        for size in d["sizes"]:
            size["batch"] = 7

    def other_data(d):
        d["data"]["source"], d["passed"] = "other.txt", False
        outputs = [metrics for mode in d["outputs"].values() for metrics in mode.values()]
        for metrics in [*outputs, *(site[mode] for site in d["sites"] for mode in ("local", "propagated"))]:
            metrics["relative_error"] += 1.0

    doctor = write("doctor.json", make_document("doctor", {"ok": True, "findings": []}))
    cases = (
        ("the first holds validate, the second profile", checked, timed),
        ("the first holds doctor, the second doctor", doctor, doctor),
        ("outputs of validate: ['hidden'] against ['logits']", checked, write("b.json", documents["validate"], renamed)),
        ("nodes of the classical model", timed, write("c.json", documents["profile"], other_graph)),
        ("no figure in common", timed, write("d.json", documents["profile"], other_sizes)),
        ("none is judged: errors of validate", checked, write("f.json", documents["validate"], other_data)),
    )
    for words, a, b in cases:
        assert_one_line(*qexport("compare", a, b), words, expected=2)
    damaged = write("e.json", documents["validate"], lambda d: d.pop("sites"))
    for words, b in (("its validate lacks 'sites'", damaged), ("cannot be read", "absent.json")):
        assert_one_line(*qexport("compare", checked, b), words)
    with pytest.raises(UsageError, match="threshold must be"):
        compare(checked, checked, threshold=-0.1)


def test_errors_of_other_data_are_not_judged(write, documents):
    def other(d):
        d["data"]["source"] = "20 texts of /somewhere/other.txt"
        scaled(d["outputs"]["library"]["hidden"], 3)
        d["passed"] = False

    found = compare(write("a.json", documents["validate"]), write("b.json", documents["validate"], other))
    assert verdicts(found) == {"error of output hidden": UNJUDGED, "passed": UNJUDGED}
    assert found.passed
    stored, given = (f"{source}, 2 items, CPUExecutionProvider" for source in ("stored samples", "other.txt"))
    assert found.notes[0] == f"errors of validate are not judged: {stored} against {given}"


def test_errors_on_other_providers_are_not_judged(write, documents):
    """Documents of versions that recorded none are the CPU's."""

    def worse(d):
        scaled(d["outputs"]["library"]["hidden"], 3)

    def on_cuda(d):
        worse(d)
        d["settings"]["providers"] = ["CUDAExecutionProvider"]

    old = write("a.json", documents["validate"], lambda d: d.pop("settings"))
    assert verdicts(compare(old, write("b.json", documents["validate"], worse))) == {"error of output hidden": WORSE}
    found = compare(old, write("b.json", documents["validate"], on_cuda))
    assert verdicts(found) == {"error of output hidden": UNJUDGED}
    assert found.notes[0].endswith("items, CPUExecutionProvider against stored samples, 2 items, CUDAExecutionProvider")


def test_memory_on_other_providers_is_not_judged(write, documents):
    """Beside a GPU that of the process is not the model's."""
    swept = sweep((16,), heads=1, head_size=8, strategies=["exact"], seconds=60.0).to_dict()
    swept["contenders"][0]["lengths"][0]["memory_bytes"] = 2**22

    def profiled_larger(d):
        d["sizes"][0]["models"]["converted"]["memory"]["peak_bytes"] *= 2
        d["sizes"][0]["models"]["converted"]["arena_peak_bytes"] = 2**30

    def swept_larger(d):
        d["contenders"][0]["lengths"][0]["memory_bytes"] *= 2

    for kind, document, larger in (("profile", documents["profile"], profiled_larger), ("scaling", swept, swept_larger)):

        def on_cuda(d, larger=larger):
            larger(d)
            d["settings"]["providers"] = ["CUDAExecutionProvider"]

        a = write("a.json", document)
        here = compare(a, write("b.json", document, larger))
        there = compare(a, write("c.json", document, on_cuda))
        assert set(verdicts(here).values()) == {WORSE}
        assert verdicts(there) == dict.fromkeys(verdicts(here), UNJUDGED)
        assert f"sizes of {kind} are not judged: CPUExecutionProvider against CUDAExecutionProvider" in there.notes
