"""bench.attention: what it times is right, its baselines are what they say, and goals are judged by the right row."""

import importlib.util
import json
import time
import tomllib

import numpy as np
import pytest
from summary_cases import cache

from bench import common
from bench.attention import decode, goals, prefill, quality
from bench.cuda import cases as cuda_cases
from qexport.scaling import reference

TIMING = {"seconds": 0.0, "least": 2, "clock": time.perf_counter}


def test_ratio_is_the_median_of_ratios():
    found = common.ratio("x", np.array([2.0, 4.0, 30.0]), np.array([1.0, 1.0, 10.0]))
    assert found == {"x": 3.0, "x_p25": 2.5, "x_p75": 3.5}


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_measures_everyone(causal):
    rows = [row for row in prefill.table([40], [1], peaks={"fp32_gflops": 100.0}, **TIMING) if row["causal"] == causal]
    names = {row["contender"] for row in rows}
    assert {"exact fp32", "exact bf16", "exact int8", "tree 1/8", *prefill.RIVALS.values()} - names == (
        set() if causal else {"GroupQueryAttention"}
    )
    row = next(row for row in rows if row["contender"] == "exact fp32")
    pairs = 40 * 41 // 2 if causal else 1600
    assert row["error"] <= prefill.LIMITS["fp32"]
    assert row["ns_per_pair"] == pytest.approx(1e6 * row["ms"] / pairs)
    assert row["percent_of_fp32_peak"] == pytest.approx(100 * 4 * 64 / row["ns_per_pair"] / 100)
    assert row["ms_p25"] <= row["ms"] <= row["ms_p75"]
    assert row["x_mha"] > 0


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(reference, "attention", lambda *_: np.ones((1, 1, 40, 64)))
    with pytest.raises(SystemExit, match=r"exact fp32: relative error .* is above 2e-05; nothing was timed"):
        prefill.table([40], [1], peaks={}, **TIMING)


def test_decode_measures_everyone():
    """All of them agree with float64 on the last query, with a past of 70 keys, however the cache is held."""
    rows = decode.table([70], [1], peaks={"read_gb_per_s 1": 10.0}, **TIMING)
    assert set(decode.RIVALS.values()) <= {row["contender"] for row in rows}
    for row in rows:
        limit = 0.01 if "16 cache" in row["contender"] else 1e-5
        if not row["contender"].startswith("tree"):
            assert row["error_worst"] <= limit, row["contender"]
    row = next(row for row in rows if row["contender"] == "exact, bf16 cache")
    assert row["percent_of_bandwidth"] == pytest.approx(100 * (2 * 8 * 71 * 64 * 2) / (1e6 * row["ms"] * 10))


def test_grouped_heads_decode_as_repeated_ones():
    q, k, v = decode.gaussian(600, kv_heads=2)
    expected = reference.attention(q, k.repeat(4, 1), v.repeat(4, 1), np.array([0]), False)
    found = decode.contenders(q, k, v, 1)
    assert set(decode.RIVALS.values()) - set(found) == {"MultiHeadAttention, past"}
    errors = {}
    for name, contender in found.items():
        contender.call()
        errors[name] = common.relative_error(contender.output(), expected)
        if not name.startswith("tree"):
            assert errors[name] <= (0.01 if "16 cache" in name else 1e-5), name
    assert errors["tree 1/16, bf16 cache"] == pytest.approx(errors["tree 1/16, static cache"], rel=0.1)
    assert errors["tree 1/16, static cache"] < errors["tree 1/64, static cache"] < 1


def test_steps_compare_estimates_with_errors(monkeypatch):
    """On keys that cluster and values that do not: all contenders' rows, and shares that the arrays themselves give."""
    k, v = cache(3, kv_heads=3, n=4300, v_size=32)
    q = 0.5 * np.random.default_rng(0).standard_normal(k.shape, dtype=np.float32)
    v = v + np.random.default_rng(1).standard_normal(v.shape, dtype=np.float32)
    monkeypatch.setattr(decode.activations, "activations", lambda name: (q, k, v))
    rows = {row["contender"]: row for row in decode.certificate(["any"], 1)}
    assert list(rows) == list(decode.CERTIFIED)
    for row in rows.values():
        assert row["within_1_5"] is None or 0.5 < row["estimate_mean"] / row["error_mean"] < 2, row
        assert row["kept"] is None or row["kept"] > 0.8
    assert all(row["exact"] == 0 for name, row in rows.items() if "tolerance" not in name)
    halved = decode._compared(
        np.ones((1, 1, 2)), np.array([[[0.5, 0.0]]]), np.full((1, 1, 2), 10.0), {"error_tolerance": 0.1}
    )
    assert halved["exact"] == 0.5
    assert halved["rows_within_1_5"] == 0
    assert halved["error_worst"] == pytest.approx(0.1)
    assert halved["estimate_worst"] == pytest.approx(0.5 / np.sqrt(200))
    assert halved["kept"] == 1


def test_gaussian_errors_shrink_with_the_budget():
    rows = [row for row in quality.gaussian([256], 1) if row["estimator"] == "top k and mean V"]
    errors = [row["error_mean"] for row in rows]
    assert [row["samples"] for row in rows] == [8, 32, 128]
    assert errors == sorted(errors, reverse=True)


GOAL = {"text": "fast", "table": "t", "where": {"n": {"min": 8}, "name": "a*"}, "value": "x", "at_least": 2}
ROWS = [{"n": n, "name": name, "x": x} for n, name, x in ((4, "a", 0.5), (8, "a1", 1.5), (16, "ab", 3.0), (16, "b", 9.0))]


@pytest.mark.parametrize(
    ("change", "measured", "verdict"),
    [
        ({}, 1.5, "missed"),
        ({"pick": "best"}, 3.0, "met"),
        ({"at_least": 1.5}, 1.5, "met"),
        ({"where": {"n": 16}}, 3.0, "met"),
        ({"where": {"n": [4, 8]}}, 0.5, "missed"),
        ({"where": {"n": 32}}, None, "not measured"),
        ({"where": {"m": 1}}, None, "not measured"),
        ({"isa": ["other", "another"]}, None, "needs other or another"),
        ({"isa": ["other", "here"]}, 1.5, "missed"),
    ],
)
def test_goals_are_decided_by_the_right_row(change, measured, verdict, monkeypatch, tmp_path):
    _goals(monkeypatch, tmp_path, GOAL | change)
    (found,) = goals.judged({"t": ROWS}, "here")
    assert (found["measured"], found["verdict"]) == (measured, verdict)


@pytest.mark.parametrize(("pick", "measured"), [("worst", 9.0), ("best", 0.5)])
def test_goals_of_at_most_look_the_other_way(pick, measured, monkeypatch, tmp_path):
    _goals(monkeypatch, tmp_path, {"text": "small", "table": "t", "where": {}, "value": "x", "at_most": 2, "pick": pick})
    assert goals.judged({"t": ROWS}, "here")[0]["measured"] == measured


def test_a_benchmark_judges_its_own_goals(monkeypatch, tmp_path):
    _goals(monkeypatch, tmp_path, GOAL | {"file": "mine", "where": {"n": 16}})
    (found,) = goals.judged({"t": ROWS}, "here", file="mine")
    assert (found["measured"], found["verdict"], found["command"]) == (3.0, "met", "python -m bench.mine")
    assert goals.judged({"t": ROWS}, "here", file="other") == []


def _goals(monkeypatch, folder, goal):
    file = folder / "goals.toml"
    file.write_text("[[goal]]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in goal.items()))
    monkeypatch.setattr(goals, "GOALS", file)


def _toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def test_every_goal_can_be_judged():
    """Each goal names a benchmark and a table of its results, and those of bench.attention a column and rows too."""
    attention = json.loads((goals.RESULTS / "attention.json").read_text())
    for goal in tomllib.loads(goals.GOALS.read_text())["goal"]:
        assert ("at_least" in goal) != ("at_most" in goal), goal["text"]
        if "file" in goal:
            assert importlib.util.find_spec(f"bench.{goal['file']}"), goal["text"]
            results = goals.RESULTS / f"{goal['file']}.json"
            # Of a GPU there are results where somebody had one.
            tables = json.loads(results.read_text()) if results.is_file() or goal["file"] != "cuda" else cuda_cases.TABLES
            assert goal["table"] in tables, goal["text"]
        else:
            rows = attention[goal["table"]]
            assert all(goal["value"] in row for row in rows), goal["text"]
            found = any(goals.matches(row, goal["where"]) for row in rows)
            assert found or goal.get("pick") == "best" or attention["parameters"]["quick"], goal["text"]
