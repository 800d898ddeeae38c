"""bench.architectures: one type converted and compared, one declined with its reason, and the tables written of them."""

import json
import sys
import tomllib

import numpy as np
import pytest

pytest.importorskip("transformers")

from bench import architectures, figures
from bench.markdown import load
from qexport.sources.huggingface import TASKS

DATA = tomllib.loads(architectures.FILE.read_text())


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["architectures", *map(str, arguments)])
    architectures.main()


def test_types_are_converted_or_declined_and_taken_up_again(tmp_path, monkeypatch):
    names, rows, file = ("vit", "decision_transformer"), tmp_path / "rows.jsonl", tmp_path / "results.json"
    run(monkeypatch, "--only", *names, "--resume", rows, "--json", file)
    vit, declined = json.loads(file.read_text())["architectures"]
    assert (vit["type"], vit["model"], vit["converted"], vit["left_alone"], vit["reason"]) == ("vit", "ViTModel", 2, 0, "")
    assert 0 < vit["difference"] < 1e-5
    assert (declined["model"], declined["converted"], declined["difference"]) == ("DecisionTransformerModel", 0, None)
    assert "no example inputs are known" in declined["reason"]
    assert {json.loads(line)["type"] for line in rows.read_text().splitlines()} == set(names)

    monkeypatch.setattr(architectures, "watched", lambda case, limit: architectures._row(case, "measured again"))
    run(monkeypatch, "--only", *names, "bert", "--resume", rows, "--json", file)
    reasons = {row["type"]: row["reason"] for row in json.loads(file.read_text())["architectures"]}
    assert reasons == {"bert": "measured again", "vit": "", "decision_transformer": declined["reason"]}


def test_a_type_has_its_time_and_no_more():
    (case,) = architectures.cases(["vit"])
    assert architectures.watched(case, 0.01)["reason"] == "not done in 0.01 s"


def test_a_difference_is_relative_and_leaves_padding_out():
    expected, mask = np.array([[[2.0], [-4.0], [1.0]]]), np.array([[1, 1, 0]])
    found = expected + np.array([[[0.0], [0.5], [9.0]]])
    assert architectures._difference(found, expected, mask) == 0.125
    assert architectures._difference(found, expected, None) == 2.25
    assert architectures._difference(None, expected, mask) == np.inf
    assert architectures._difference(found[:, :2], expected, mask) == np.inf
    expected[0, 0] = -np.inf
    assert architectures._difference(found, expected, mask) == np.inf


def test_inputs_have_another_batch_and_length_and_padding():
    def spec(name, kind, high, dtype):
        return {"name": name, "kind": kind, "high": high, "dtype": dtype, "shape": ["batch", "sequence"]}

    specs = [spec("input_ids", "token_ids", 50, "int64"), spec("attention_mask", "mask", 2, "int64")]
    feeds = architectures.inputs({"inputs": specs, "limits": {"sequence": 12}})
    assert feeds["input_ids"].shape == (3, 12)
    assert feeds["input_ids"].max() < 50
    assert feeds["attention_mask"].sum(axis=1).tolist() == [12, 8, 12]


def test_the_results_hold_every_type_of_the_file():
    found = architectures.cases()
    names = {case.type for case in found}
    assert [row["type"] for row in load("architectures")["architectures"]] == [case.type for case in found]
    assert len(names) == len(found)
    assert {case.task for case in found} <= set(TASKS)
    assert names >= {*DATA["task"], *DATA["keys"]}
    with pytest.raises(ValueError, match=r"^lama: not in architectures\.toml$"):
        architectures.cases(["llama", "lama"])


def test_the_figures_name_every_type_with_its_reason(monkeypatch):
    def row(name, converted, left_alone, difference, reason="", notes=""):
        found = {"type": name, "kind": "vision", "converted": converted, "left_alone": left_alone}
        return found | {"difference": difference, "notes": notes, "reason": reason}

    rows = [
        row("a", 2, 0, 1e-6),
        row("b", 2, 0, 3e-6, notes="its batch is fixed at 1"),
        row("c", 1, 2, 2e-6, "its probabilities are also used by Slice 'node_7'"),
        row("d", 0, 0, None, "none of its 2 attentions can be converted; node_3: its Softmax runs over axis 1"),
        row("e", 0, 0, None, "EModel takes 'states', for which no example inputs are known; give package.module:callable"),
        row("f", 0, 0, None, "FModel takes 'states', for which no example inputs are known; give package.module:callable"),
    ]
    results = {"parameters": {"transformers": "5", "torch": "2", "layers": 2}, "architectures": rows}
    results["machine"] = {"cpu": "CPU", "threads": 2, "onnxruntime": "1"}
    monkeypatch.setattr(figures, "load", lambda name: results)
    lines = figures.architectures().splitlines()
    assert "6 model types of transformers 5" in lines[2]
    assert "2 convert in every attention" in lines[2]
    assert "by 2e-06 of the largest value in the median, and by 3e-06 in b" in lines[2]
    assert "| vision | 2 | a, b |" in lines
    assert "b: batch is fixed at 1." in lines
    assert "| c | 1 of 3 | its probabilities are also used by Slice |" in lines
    assert "| d | none | its Softmax runs over axis 1 |" in lines
    assert "| e, f | none | no example inputs are known for states |" in lines
