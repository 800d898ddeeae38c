"""The report of the memory profiler: efficiency, JSON, text and picture."""

import json
import sys
import time

import numpy as np
import pytest
from memory_cases import MB, profile

from qexport.errors import QexportError, UsageError
from qexport.memory import AdvancedMemoryProfiler
from qexport.memory.text import leak_text, size_text


def test_efficiency_names_what_is_divided():
    profiler = AdvancedMemoryProfiler(sources=("tracemalloc",))
    with profiler.profile_block("step", tokens=100, reference_bytes=80 * MB) as block:
        block.minimum_bytes = 10 * MB
        np.ones(20 * MB, np.uint8)
    found = profiler.generate_report().block("step")["efficiency"]
    rise = found["overhead"]["numerator"]["value"]
    assert rise == pytest.approx(20 * MB, rel=0.01)
    assert found["bytes_per_token"]["value"] == rise / 100
    assert found["bytes_per_token"]["denominator"] == {"what": "tokens", "value": 100}
    assert found["overhead"]["value"] == rise / (10 * MB)
    assert found["overhead"]["numerator"]["what"] == "rise of tracemalloc"
    assert found["compression_ratio"]["value"] == 80 * MB / rise
    without = profile(lambda: None, sources=("tracemalloc",)).block("step")["efficiency"]
    assert set(without.values()) == {None}


def test_the_report_as_json_text_and_picture(tmp_path):
    profiler = AdvancedMemoryProfiler()
    with profiler.profile_block("attention", tokens=32):
        np.ones(5 * MB, np.uint8)
        time.sleep(0.05)
    report = profiler.generate_report()
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (found["schema"], found["schema_version"]) == ("qexport.memory", 1)
    text = report.to_text()
    for words in ("attention: 1 call", "tracemalloc", "too few readings", "bytes per token", "measuring took"):
        assert words in text
    for kind in ("png", "svg"):
        file = tmp_path / f"memory.{kind}"
        report.plot(file)
        assert file.stat().st_size > 5000
    with pytest.raises(UsageError, match="a plot ends in"):
        report.plot(tmp_path / "memory.txt")
    with pytest.raises(KeyError):
        report.block("nothing")


def test_without_matplotlib_a_plot_is_one_line(tmp_path, monkeypatch):
    report = profile(lambda: None, sources=("tracemalloc",))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(QexportError, match=r"pip install 'qexport\[plot\]'"):
        report.plot(tmp_path / "memory.png")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, ""),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1536, "1.54 KB"),
        (-20_000_000, "-20 MB"),
        (3.2e12, "3200 GB"),
    ],
)
def test_sizes_in_words(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("verdict", "p_value", "text"),
    [
        ("too few readings", None, "too few readings"),
        ("leak", 0.0001, "leak, 1 KB a call by malloc (p = 0.0001)"),
        ("no leak", 0.2, "no leak (p = 0.2)"),
        ("no leak", 0.001, "no leak: what grew is too little to count"),
    ],
)
def test_verdicts_in_words(verdict, p_value, text):
    leak = {"verdict": verdict, "p_value": p_value, "level": 0.01, "counter": "malloc", "bytes_per_call": 1000.0}
    assert leak_text(leak) == text
