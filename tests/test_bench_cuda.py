"""bench.cuda: its arithmetic, what it does with cases that fail, and its contenders, on the CPU."""

import functools
import json
import os
import time

import numpy as np
import pytest
import torch

from bench import activations, common
from bench.cuda import __main__ as program
from bench.cuda import activations as packs
from bench.cuda import attention, figures, measure, models, nodes, ops, runner
from bench.cuda.cases import TABLES, all_cases
from bench.cuda.measure import Contender, Times
from qexport.errors import QexportError


def test_sets_outgrow_the_cache():
    assert measure.number_of_sets(set_bytes=10, cache_bytes=50) == 10
    assert measure.number_of_sets(set_bytes=33, cache_bytes=50) == 4
    assert measure.number_of_sets(set_bytes=1 << 30, cache_bytes=50) == 2
    assert measure.number_of_sets(set_bytes=1, cache_bytes=1 << 20) == measure.MOST_SETS


def test_rates_and_ratios():
    ours, theirs = Times(np.array([1.0, 2.0, 4.0]), np.full(3, 5.0)), Times(np.array([3.0, 4.0, 4.0]), np.full(3, 10.0))
    row = measure.time_columns(ours, flops=4e12, moved=6_000_000)
    assert (row["us"], row["us_p25"], row["us_p75"], row["call_us"], row["rounds"]) == (2000, 1500, 3000, 5000, 3)
    assert (row["tflops"], row["gb_per_s"]) == (pytest.approx(2000), pytest.approx(3))
    times = {"ours": ours, "theirs": theirs}
    found = measure.rival_columns(times, "ours", {"x": "theirs", "y": "absent"})
    assert (found["x"], found["x_call"], found["y"], found["y_call"]) == (2, 2, None, None)
    assert measure.rival_columns(times, "theirs", {"x": "theirs"})["x"] is None
    assert set(measure.time_columns(None, 1.0, 1)) == set(row)
    ceilings = {"float16_tflops": 8000.0, "float32_tflops": 4000.0, "copy_gb_per_s": 12.0}
    shares = measure.with_ceilings({"dtype": "bfloat16"} | row, ceilings)
    assert (shares["percent_of_matmul"], shares["percent_of_copy"]) == (pytest.approx(25), pytest.approx(25))
    assert measure.with_ceilings({"dtype": "float32"} | row, ceilings)["percent_of_matmul"] == pytest.approx(50)
    assert measure.with_ceilings(row, {})["percent_of_copy"] is None


def test_every_call_takes_the_next_set():
    seen = []
    contenders = {
        name: Contender([functools.partial(seen.append, (name, place)) for place in range(3)], lambda place: None)
        for name in "ab"
    }
    times = measure.times_of(contenders, "cpu")
    warm_up = 2 * 3
    places = [place for _, place in seen[warm_up:]]
    assert places == [i % 3 for i in range(len(places))]
    counts = {len(of) for name in "ab" for of in (times[name].device, times[name].waited)}
    assert len(counts) == 1  # what takes turns has as many of them
    assert measure.ROUNDS[0] <= counts.pop() <= measure.ROUNDS[1]


def test_a_device_that_ran_out_of_delay_is_timed_again(monkeypatch):
    """By a clock of which the device takes its delay and the host 3 million cycles to queue a call."""
    device, host, calls = 0, 0, []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(device, host)

        def query(self):
            return self.at <= host

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    def sleep(cycles):
        nonlocal device
        device = host + cycles

    def call():
        nonlocal device, host
        calls.append(host)
        host += 3_000_000
        device = max(device, host) + 70

    monkeypatch.setattr(measure.torch.cuda, "Event", Event)
    monkeypatch.setattr(measure.torch.cuda, "_sleep", sleep)
    assert measure.device_ms(call) == 70
    assert len(calls) == 2, "half a millisecond was too short"
    monkeypatch.setattr(measure, "DELAYS", (10, 20))
    with pytest.raises(QexportError, match="later than the device can wait, 20 cycles"):
        measure.device_ms(call)


def test_who_fails_or_is_wrong_has_a_row_and_no_time():
    def fails():
        raise RuntimeError("no kernel\nfor this")

    def check(name, contender):
        value = contender.result()
        return {"error": value}, "" if value < 1 else "wrong: too much"

    makers = {"right": lambda: Contender([lambda: None], lambda place: 0.5), "fails": fails}
    makers["wrong"] = lambda: Contender([lambda: None], lambda place: 2.0)
    rows = measure.compared(makers, check, lambda name: (1.0, 1), {"x": "right"}, {"n": 1}, "cpu")
    assert [(row["contender"], row["us"] is not None, row["error"], row["note"]) for row in rows] == [
        ("right", True, 0.5, ""),
        ("fails", False, None, "RuntimeError: no kernel for this"),
        ("wrong", False, 2.0, "wrong: too much"),
    ]
    assert len({tuple(row) for row in rows}) == 1


def _rows(*names):
    return [{"contender": name} for name in names[:-1]]  # the last argument is the device


def _raises(device):
    raise ValueError(f"bad\nrow on {device}")


def _dies(device):
    os._exit(7)


def _hangs(device):
    time.sleep(600)


def _trouble():
    case = runner.Case
    return [
        case("good", "first", _rows, ("a", "b")),
        case("bad", "raises", _raises),
        case("bad", "dies", _dies),
        case("good", "second", _rows, ("c",)),
        case("bad", "hangs", _hangs),
        case("good", "third", _rows, ("d",)),
    ]


def test_a_case_that_fails_dies_or_hangs_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(runner, "CASE_SECONDS", 3)
    lines = []
    tables, failures = runner.run(_trouble, "cpu", 300, lines.append)
    assert [row["contender"] for row in tables["good"]] == ["a", "b", "c", "d"]
    assert tables["bad"] == []
    assert {row["case"]: row["error"] for row in failures} == {
        "raises": "ValueError: bad row on cpu",
        "dies": "its process ended with code 7",
        "hangs": "no answer in 3 s",
    }
    assert sum("good, " in line for line in lines) == 3


def test_what_there_is_no_time_for_is_left_out():
    tables, failures = runner.run(_trouble, "cpu", 0, lambda line: None)
    assert {row["error"] for row in failures} == {"left out: no time left"}
    assert len(failures) == len(_trouble())
    assert not any(tables.values())


@pytest.mark.parametrize("causal", [False, True])
def test_exact_contenders_agree_with_float64(causal):
    rows = {row["contender"]: row for row in attention.exact(40, 64, causal, torch.float32, "cpu")}
    assert {"exact, onnxruntime", "exact, torch", attention.FLASH, "onnxruntime Attention", "torch"} <= set(rows)
    assert causal == (attention.GROUPED in rows)
    assert all(row["note"] == "" and row["error"] <= 2e-5 for row in rows.values()), rows
    ours = rows["exact, onnxruntime"]
    pairs = 40 * 41 // 2 if causal else 1600
    assert ours["tflops"] == pytest.approx(1e-6 * 4 * 8 * 64 * pairs / ours["us"])
    assert ours["gb_per_s"] == pytest.approx(1e-3 * 4 * 4 * 8 * 64 * 40 / ours["us"])
    assert ours["x_flash"] > 0


def test_a_step_of_decoding_agrees_with_float64():
    rows = {row["contender"]: row for row in attention.step(700, 2, torch.float32, "cpu")}
    assert all(row["note"] == "" for row in rows.values()), rows
    assert all(row["error"] <= 1e-4 for name, row in rows.items() if not name.startswith("tree"))
    assert rows["tree 1/16, summary"]["error"] > 0.01  # Gaussian keys: it has not read them all


def test_strategies_are_held_against_the_cpu(monkeypatch):
    rows = attention.strategies(40, torch.float32, "cpu")
    assert [row["other_rows"] for row in rows] == [0, 0, 0, 0, None]
    wrong = torch.zeros(1, 40, attention.HEADS * attention.SIZE)
    monkeypatch.setattr(nodes, "cpu_output", lambda *_: wrong)
    notes = {row["contender"]: row["note"] for row in attention.strategies(40, torch.float32, "cpu")}
    assert notes["stratified"] == "wrong: 100.00% of the rows are not the CPU's; not timed"
    assert notes["hybrid"].startswith("wrong: the error is 0.0")
    assert notes["hybrid"].endswith(", on the CPU 1; not timed")
    assert notes[attention.FLASH] == ""


def test_rows_that_differ_by_rounding_are_the_same():
    wanted = torch.randn(4, 8)
    found = wanted * (1 + 4 * torch.finfo(torch.float32).eps)
    assert attention.other_rows(found, wanted) == 0
    found[2] += 1e-3
    assert attention.other_rows(found, wanted) == 0.25


@pytest.mark.parametrize("op", ["MPSDecode", "MPSAttention", "MPOLinear"])
def test_trains_agree_with_torch(op):
    rows = ops.train_case(op, 64, 4, 3, "cpu")
    assert [(row["contender"], row["note"]) for row in rows] == [("onnxruntime", ""), ("torch", "")]
    assert max(row["error"] for row in rows) <= ops.LIMIT


@pytest.mark.parametrize(("op", "attributes"), [("QuantumNoise", {"basis": "x"}), ("QuantumMeasure", {"shots": 8})])
def test_rows_of_probabilities(op, attributes, monkeypatch):
    row = ops.row_case(op, 16, 32, attributes, "cpu")[0]
    assert (row["note"], row["other_rows"], row["gb_per_s"]) == ("", 0, pytest.approx(1e-3 * 8 * 16 * 32 / row["us"]))
    monkeypatch.setattr(nodes, "cpu_output", lambda *_: torch.full((16, 32), 0.5))
    assert ops.row_case(op, 16, 32, attributes, "cpu")[0]["note"].startswith("wrong: relative error")


def test_a_pack_gives_the_activations_of_its_model(tmp_path):
    """As bench.activations has them, up to 8 bits of the weights; positions are stretched in both."""
    file = tmp_path / "pack.xz"
    models.save([packs.minilm(2, 600)], file)
    (read,) = models.load(file)
    assert (read.name, read.causal, read.heads, read.kv_heads) == ("minilm", False, 12, 12)
    expected = activations.minilm(600)
    for layer, found in enumerate(read.layers(600, "cpu")):
        for tensor, wanted in zip(found, expected, strict=True):
            whole = torch.from_numpy(wanted[layer]).transpose(0, 1).flatten(1)[None]
            assert 0 < common.relative_error(tensor, whole) < 0.05
    with pytest.raises(ValueError, match="n must be at most 600, the tokens of minilm in the file, got 601"):
        read.layers(601, "cpu")


@pytest.mark.registry
def test_packs_of_other_models():
    from bench.data import large_photo_pixels

    stories = packs.stories(2, 300)
    assert stories.causal
    for made, n, expected in (
        (stories, 300, activations.stories15m(300)),
        (packs.vit(2, large_photo_pixels()), 1370, activations.vit()),
    ):
        for layer, found in enumerate(made.layers(n, "cpu")):
            for tensor, wanted in zip(found, expected, strict=True):
                whole = torch.from_numpy(wanted[layer]).transpose(0, 1).flatten(1)[None]
                assert 0 < common.relative_error(tensor, whole) < 0.08


def test_weights_in_eight_bits():
    weight = torch.randn(5, 300) * torch.tensor([1.0, 1e-3, 10.0, 0.0, 1.0])[:, None]
    found = models.Activations("minilm", False, 1, 1, {}, models.packed({"w": weight, "b": weight[0]}))
    assert found.weights["w"].dtype == np.int8
    read = found._tensor("w", "cpu", torch.float32)
    assert bool(((read - weight).abs() <= weight.abs().amax(1, keepdim=True) / 250 + 1e-7).all())
    assert torch.allclose(found._tensor("b", "cpu", torch.float32), weight[0], rtol=1e-3)


@pytest.mark.parametrize(("n", "expected"), [(4096, (63, 65)), (16384, (127, 129)), (65536, (255, 257)), (1370, (37, 37))])
def test_patches_lie_in_a_grid(n, expected):
    assert models.grid(n) == expected


def test_tree_rows_have_errors_of_all_layers(tmp_path):
    file = tmp_path / "pack.xz"
    models.save([packs.minilm(2, 512)], file)
    rows = {row["contender"]: row for row in attention.tree(models.load(file)[0], 512, torch.float32, "cpu")}
    assert all(row["note"] == "" for row in rows.values()), rows
    found = [rows[f"tree 1/{density}"]["error_mean"] for density in attention.DENSITIES]
    assert found == sorted(found, reverse=True)
    assert 0.01 < found[-1] < 0.5
    assert all(row["error_on_cpu"] == row["error_mean"] for name, row in rows.items() if name.startswith("tree"))
    assert rows["exact, onnxruntime"]["error_worst"] < 1e-5


def test_cases_are_those_of_the_tables_that_were_asked_for(tmp_path):
    assert {case.table for case in all_cases(TABLES, "cuda", False, None)} == set(TABLES) - {"tree"}
    file = tmp_path / "pack.xz"
    models.save([packs.minilm(1, 64)], file)
    cases = all_cases(("tree",), "cuda", False, file)
    assert [case.table for case in cases] == ["ceilings", "tree", "tree", "tree", "tree"]


def test_the_program_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "cuda.json"
    program.main(["--device", "cpu", "--quick", "--tables", "rows", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["benchmark"] == "cuda"
    assert found["parameters"]["copy_gb_per_s"] > 0
    assert {row["op"] for row in found["rows"]} == {"QuantumNoise", "QuantumMeasure"}
    assert all(row["percent_of_copy"] > 0 for row in found["rows"])
    assert {row["verdict"] for row in found["goals"]} == {"not measured"}
    assert found["failures"] == []
    assert "rows, QuantumNoise, 64 rows of 64" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="torch sees no NVIDIA GPU here; --device cpu --quick"):
        program.main([])


def test_there_are_figures_of_a_gpu_only_after_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.gpu() == ""
    (tmp_path / "cuda.json").touch()
    rows = attention.exact(32, 64, False, torch.float32, "cpu")
    card = {"card": "a card", "driver": "1", "cuda": "13", "onnxruntime": "1", "torch": "2", "copy_gb_per_s": 3000.0}
    card |= {"float16_tflops": 700.0, "float32_tflops": 50.0}
    results = {"parameters": card, "exact": [measure.with_ceilings(row, card) for row in rows]}
    results["rows"] = [measure.with_ceilings(row, card) for row in ops.row_case("QuantumNoise", 16, 32, {}, "cpu")]
    results["decode"] = [measure.with_ceilings(row, card) for row in attention.step(700, 2, torch.float32, "cpu")]
    monkeypatch.setattr(figures, "load", lambda name: results)
    text = figures.gpu()
    assert "a card, driver 1" in text
    assert "| 32 | 64 |  | float32 |" in text
    assert "| QuantumNoise | 16 rows of 32, depolarizing |" in text
    assert "| 0k | 2 | exact, onnxruntime |" in text
    assert "n = 16384, MiniLM | >= 1.5 |  | not measured |" in text
