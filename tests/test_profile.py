"""profile: the figures add up, both models are measured apart, and what is asked for is what runs."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from bundle_factory import LIMIT, WIDTH, make_bundle, manifest
from scipy import stats

from qexport import profiling
from qexport.bundle import Bundle
from qexport.errors import QexportError, UsageError
from qexport.profiling import CLASSICAL, CONVERTED, profile
from qexport.profiling.model_memory import model_memory
from qexport.profiling.timing import interleaved, median_interval
from qexport.profiling.trace import arena_peak, node_table, op_table, peak_raises, placement, read_trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("profile") / "bundle")


@pytest.fixture(scope="module")
def report(folder):
    return profile(folder, batch=(1, 2), seq=(8, 32), runs=12, warmup=1, threads=1).to_dict()


def test_every_size_is_there_once(report):
    assert [(s["batch"], s["sequence"]) for s in report["sizes"]] == [(1, 8), (1, 32), (2, 8), (2, 32)]
    assert report["sizes"][3]["dims"] == {"batch": 2, "sequence": 32}
    json.dumps(report, allow_nan=False)


def test_latencies_and_throughput_are_consistent(report):
    for size in report["sizes"]:
        for figures in size["models"].values():
            ms = figures["latency_ms"]
            assert 0 < ms["min"] <= ms["p50"] <= ms["p90"] <= ms["p99"] <= ms["max"]
            assert ms["min"] <= ms["mean"] <= ms["max"]
            assert figures["samples_per_second"] == pytest.approx(size["batch"] / ms["mean"] * 1e3)
            assert figures["tokens_per_second"] == pytest.approx(size["sequence"] * figures["samples_per_second"])
        ratio = size["ratio"]
        medians = [size["models"][which]["latency_ms"]["p50"] for which in (CONVERTED, CLASSICAL)]
        assert ratio["of_medians"] == pytest.approx(medians[0] / medians[1])
        low, high = ratio["median_ci95"]
        assert low <= ratio["of_rounds"]["p50"] <= high


def test_the_ops_of_both_models(report):
    classical, converted = (report["sizes"][0]["models"][which] for which in (CLASSICAL, CONVERTED))
    nodes = {which["op"]: which["nodes"] for which in classical["ops"]}
    assert nodes["Attention"] == 2
    assert "QuantumAttention" not in nodes
    sampled = [row for row in converted["ops"] if row["op"] == "QuantumAttention"]
    assert [row["nodes"] for row in sampled] == [2]
    assert {n["name"] for n in converted["nodes"] if n["op"] == "QuantumAttention"} == {
        "layer0.attention",
        "layer1.attention",
    }
    for model in (classical, converted):
        assert sum(row["share"] for row in model["ops"]) == pytest.approx(1)
        assert sum(node["time_us"] for node in model["nodes"]) == pytest.approx(sum(r["time_us"] for r in model["ops"]))
        assert model["placement"]["nodes"] == {"CPUExecutionProvider": len(model["nodes"])}
        assert model["placement"]["memcpy_nodes"] == 0
        assert model["placement"]["not_on_first_provider"] == []


def test_memory_is_measured_in_a_child(report):
    for size in report["sizes"]:
        for figures in size["models"].values():
            memory = figures["memory"]
            assert 0 < memory["before_bytes"] <= memory["loaded_bytes"] <= memory["peak_bytes"]
            assert 0 < memory["load_seconds"] < 60


def test_memory_in_detail(folder):
    report = profile(folder, seq=16, runs=2, warmup=0, threads=1, memory=True).to_dict()
    json.dumps(report, allow_nan=False)
    for which, figures in report["sizes"][0]["models"].items():
        found = figures["memory"]["profile"]
        blocks = {"/".join(block["path"]): block for block in found["blocks"]}
        assert set(blocks) == {"model", "model/load", "model/run"}
        assert blocks["model/run"]["leak"]["verdict"] in ("no leak", "slows down")
        whole = blocks["model"]["efficiency"]
        assert whole["bytes_per_token"]["denominator"] == {"what": "tokens", "value": 16}
        # weights, two inputs of 16 int64 and one output of 16 x WIDTH floats
        path = Bundle.open(folder).classical_path if which == CLASSICAL else Bundle.open(folder).model_path
        assert whole["overhead"]["denominator"]["value"] == path.stat().st_size + 2 * 16 * 8 + 16 * WIDTH * 4
        assert (whole["compression_ratio"] is None) == (which == CLASSICAL)
        peaks = [node["memory_peak_bytes"] for node in figures["nodes"] if node["memory_peak_bytes"] is not None]
        assert not peaks or max(peaks) <= figures["arena_peak_bytes"]


def test_the_parents_memory_does_not_count(folder):
    """A large block in this process must not show in the child, as it does with ru_maxrss after a fork."""
    block = np.ones(400 * 2**20, np.uint8)
    bundle = Bundle.open(folder)
    feed = {"input_ids": np.zeros((1, 4), np.int64), "attention_mask": np.ones((1, 4), np.int64)}
    answer = model_memory(bundle.classical_path, None, ["CPUExecutionProvider"], 1, feed)
    assert block.nbytes > answer["peak_bytes"]


def test_a_module_in_the_working_folder_is_not_taken_for_pythons(folder, tmp_path, monkeypatch):
    (tmp_path / "math.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    feed = {"input_ids": np.zeros((1, 4), np.int64), "attention_mask": np.ones((1, 4), np.int64)}
    assert model_memory(Bundle.open(folder).classical_path, None, ["CPUExecutionProvider"], 1, feed)["peak_bytes"] > 0


def test_the_models_peak_grows_with_what_it_does(folder):
    bundle = Bundle.open(folder)

    def peak(items):
        feed = {"input_ids": np.zeros((items, 64), np.int64), "attention_mask": np.ones((items, 64), np.int64)}
        return model_memory(bundle.classical_path, None, ["CPUExecutionProvider"], 1, feed)["peak_bytes"]

    # the scores of one attention alone hold items * heads * 64 * 64 floats
    assert peak(2000) - peak(1) > 2000 * 2 * 64 * 64 * 4 / 2


def test_rounds_take_turns():
    order = []
    times = interleaved({name: partial(order.append, name) for name in "abc"}, least=4, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(ms) for name, ms in times.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize("count", [6, 7, 20, 51, 200, 3000])
def test_the_interval_of_the_median_against_the_binomial(count):
    low, high = median_interval(count)
    assert low + high == count - 1

    def outside(k):  # the median lies below order statistic k or above its mirror image
        return 2 * stats.binom.cdf(k, count, 0.5)

    assert outside(low) <= 0.05 < outside(low + 1)


def test_too_few_rounds_have_no_interval():
    assert median_interval(5) == (None, None)


# The trace reader, on a trace written by hand: two runs, a node that is called twice, scratch memory, a copy to a device.


def event(name, op, ts, dur, provider="CPUExecutionProvider", index="0", **memory):
    args = {"op_name": op, "provider": provider, "node_index": index, **{k: str(v) for k, v in memory.items()}}
    return {"cat": "Node", "name": name + "_kernel_time", "ts": ts, "dur": dur, "args": args}


def test_a_trace_by_hand(tmp_path):
    run = {"cat": "Session", "name": "model_run"}
    gpu = {"provider": "CUDAExecutionProvider"}
    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9, "args": {}},
        {**run, "ts": 100, "dur": 100},
        event(
            "a", "MatMul", 110, 10, index="1", mem_in_use_peak=50, mem_bytes_in_use=30, mem_in_use_delta=20, output_size=20
        ),
        event(
            "b", "Softmax", 130, 30, index="2", mem_in_use_peak=50, mem_bytes_in_use=40, mem_in_use_delta=10, output_size=8
        ),
        event("copy", "MemcpyToHost", 170, 5, index="3", **gpu),
        {**run, "ts": 300, "dur": 100},
        event("a", "MatMul", 310, 20, index="1"),
        event("a", "MatMul", 340, 10, index="1"),
        event("copy", "MemcpyToHost", 370, 5, index="3", **gpu),
        {"cat": "Node", "name": "a_fence_before", "ts": 309, "dur": 1, "args": {}},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(events))
    runs = read_trace(path)
    assert [len(one) for one in runs] == [3, 3]
    nodes = node_table(runs, runs[0])
    by_name = {node["name"]: node for node in nodes}
    assert by_name["a"]["time_us"] == 20
    assert by_name["a"]["calls"] == 1.5
    assert by_name["a"]["share"] == pytest.approx(40 / 80)
    assert by_name["a"]["output_bytes"] == 20
    # before `a` 10 bytes were in use; its peak of 50 holds 20 of scratch beside its output
    assert by_name["a"]["memory_peak_raised_bytes"] == 40
    assert by_name["b"]["memory_peak_raised_bytes"] == 0
    assert (by_name["a"]["memory_peak_bytes"], by_name["copy"]["memory_peak_bytes"]) == (50, None)
    assert by_name["copy"]["memory_in_use_bytes"] is None
    assert by_name["copy"]["memory_peak_raised_bytes"] is None
    assert arena_peak(runs) == 50
    assert peak_raises([]) == {}
    ops = op_table(nodes)
    assert ops[0] == {"op": "MatMul", "provider": "CPUExecutionProvider", "nodes": 1, "time_us": 20, "share": 0.5}
    where = placement(nodes, ["CUDAExecutionProvider"])
    assert where["nodes"] == {"CPUExecutionProvider": 2, "CUDAExecutionProvider": 1}
    assert where["memcpy_nodes"] == 1
    assert sorted(where["not_on_first_provider"]) == ["a", "b"]


def test_a_broken_trace(tmp_path):
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(QexportError, match="trace cannot be read"):
        read_trace(tmp_path / "t.json")


# What is asked for wrongly.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "runs must be >= 1, got 0"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"batch": (0,)}, "batch must be >= 1, got 0"),
        ({"seq": (8, LIMIT + 1)}, f"sequence {LIMIT + 1} is longer than the model takes ({LIMIT})"),
        ({"seq": ()}, "seq must hold at least one number"),
        ({"providers": ["AbacusExecutionProvider"]}, "'AbacusExecutionProvider' is not in this onnxruntime"),
    ],
)
def test_wrong_arguments(folder, options, message):
    with pytest.raises(UsageError) as error:
        profile(folder, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["n", 4], [(4, None), (8, None)]),
        (["n", "length", 4], [(4, 4), (4, 64), (8, 4), (8, 64)]),
        ([2, 16], [(2, None)]),
        ([2, "length"], [(2, 4), (2, 64)]),
        ([], [(1, None)]),
    ],
)
def test_sizes_are_those_that_run(folder, shape, expected):
    """Also where the model has them fixed and other ones were asked for: throughput is counted by them."""
    spec = {"name": "x", "dtype": "float32", "shape": shape, "kind": "continuous", "high": None}
    bundle = Bundle(folder, {**manifest(), "inputs": [spec], "limits": {}})
    assert [(b, s) for b, s, _ in profiling._distinct_sizes(bundle, [4, 8], [4, 64])] == expected


def test_a_failing_child_is_one_line(folder):
    feed = {"input_ids": np.full((1, 4), 999), "attention_mask": np.ones((1, 4), np.int64)}
    with pytest.raises(QexportError) as error:
        model_memory(Bundle.open(folder).classical_path, None, ["CPUExecutionProvider"], 1, feed)
    assert "node 'node_embedded' (Gather) failed" in str(error.value)
    assert "\n" not in str(error.value)


def test_one_thread_is_one_thread(folder):
    """With one intra-op thread the runtime starts no worker threads; with two it starts one."""
    code = (
        "import os, sys; from qexport.runtime import quiet_options, session; "
        "count = lambda: len(os.listdir('/proc/self/task')); "
        f"s = session({str(folder)!r}, library=False, options=quiet_options(1)); one = count(); "
        f"t = session({str(folder)!r}, library=False, options=quiet_options(2)); print(count() - one)"
    )
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc to count threads")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1", done.stderr


def test_without_the_library(folder):
    report = profile(folder, library=False, seq=8, runs=2, warmup=0)
    assert "QuantumAttention" not in {row["op"] for row in report.sizes[0]["models"][CONVERTED]["ops"]}
    assert report.settings["library"] is False
    assert report.sizes[0]["ratio"]["median_ci95"] is None


def test_memory_over_time(folder):
    """Seen from outside: from opening the session to the end of the runs, within what the process says of itself."""
    for model in profile(folder, seq=(16,), runs=2, warmup=0).sizes[0]["models"].values():
        memory = model["memory"]
        timeline = memory["timeline"]
        assert timeline["seconds"] == sorted(timeline["seconds"])
        assert len(timeline["seconds"]) == len(timeline["bytes"])
        assert 0 < timeline["loaded"] == memory["load_seconds"] < timeline["done"]
        assert timeline["seconds"][0] == 0
        assert timeline["bytes"][0] == memory["before_bytes"]
        assert timeline["seconds"][-1] == timeline["done"]
        assert all(0 <= at <= timeline["done"] for at in timeline["seconds"])
        # the kernel's counters lag by some pages
        assert all(0.9 * memory["before_bytes"] <= size <= 1.01 * memory["peak_bytes"] for size in timeline["bytes"])
