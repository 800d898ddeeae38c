"""scaling: the fit, what a sweep measures and whom it stops, the memory of a call, the picture and the command."""

import json
import sys
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from memory_cases import alone
from scipy import stats

from qexport import _core, scaling
from qexport.cli.scaling import command
from qexport.errors import QexportError, UsageError
from qexport.memory.rss import extra_rss
from qexport.profiling.timing import interleaved
from qexport.scaling import contenders, plot, sweep
from qexport.scaling.contenders import FAMILIES, Entry
from qexport.scaling.fit import power_law, predicted
from qexport.scaling.inputs import Activations
from qexport.scaling.nodes import Contender

pytestmark = pytest.mark.usefixtures("few_runs")
EXACT = ("exact fp32", "MultiHeadAttention", "Attention", "GroupQueryAttention", "SDPA")


@pytest.fixture
def few_runs(monkeypatch):
    monkeypatch.setattr(scaling, "QUICK_SECONDS", 0.0)


def test_power_law_against_scipy():
    lengths = [128, 256, 512, 1024, 4096]
    times = [0.3, 1.3, 4.0, 21.0, 290.0]
    found = power_law(lengths, times)
    expected = stats.linregress(np.log(lengths), np.log(times))
    half = stats.t.ppf(0.975, 3) * expected.stderr
    assert found["exponent"] == pytest.approx(expected.slope)
    assert found["ci95"] == pytest.approx([expected.slope - half, expected.slope + half])
    assert found["last_exponent"] == pytest.approx(np.log(290 / 21) / np.log(4))
    assert found["factor"] == pytest.approx(np.exp(expected.intercept))
    residuals = np.log(times) - expected.intercept - expected.slope * np.log(lengths)
    assert found["spread"] == pytest.approx(np.exp((residuals @ residuals / 3) ** 0.5))


def test_power_law_of_few_lengths():
    assert power_law([128], [1.0]) is None
    two = power_law([128, 256], [1.0, 8.0])
    assert two["exponent"] == pytest.approx(3.0)
    assert two["ci95"] is two["spread"] is None


def test_prediction():
    assert predicted([], 64, None) is None
    assert predicted([(8, 3.0), (16, 5.0)], 64, None) == 80.0
    assert predicted([(16, 5.0)], 64, {"exponent": 1.0, "last_exponent": 0.5}) == 20.0
    assert predicted([(16, 5.0)], 64, {"exponent": 1.0, "last_exponent": 1.5}) == 40.0


@pytest.mark.parametrize("causal", [False, True])
def test_everybody_is_measured_or_named(causal):
    report = sweep([40, 80], heads=2, head_size=16, causal=causal, seconds=30.0)
    found = {contender["name"]: contender for contender in report.contenders}
    absent = {one["strategy"] for one in report.left_out if one["name"] not in ("exact bf16", "exact int8")}
    packages = {"Performer": "performer_pytorch", "Linformer": "linformer"}
    away = {name for name, package in packages.items() if find_spec(package) is None}
    assert absent == away | ({"Linformer", "uniform"} if causal else {"GroupQueryAttention"})
    assert {c["strategy"] for c in report.contenders} == set(FAMILIES) - absent
    assert {name for name in ("exact fp32", "exact bf16", "exact int8") if name in found} == {
        f"exact {precision}" for precision in _core.precisions()
    }
    for name, contender in found.items():
        assert [row["n"] for row in contender["lengths"]] == [40, 80]
        assert contender["stopped"] is None
        for row in contender["lengths"]:
            assert row["runs"] >= scaling.RUNS
            assert 0 < row["ms_p25"] <= row["ms"] <= row["ms_p75"]
            assert row["error_mean"] <= row["error_worst"]
            if name.startswith("exact ") or name in EXACT:
                assert row["error_mean"] < (1e-5 if name in EXACT else 0.02), name
            elif name.split()[0] in ("naive", "Performer", "Linformer", "uniform"):
                assert row["error_mean"] > 0.05, name
    if not causal:
        drawn, kinder = found["stratified 32"]["lengths"][1], found["hybrid 32"]["lengths"][1]
        assert drawn["bound"] == scaling.reference.gaussian_bound(32, 80)
        assert kinder["bound"] is None
    else:
        assert all(row["bound"] is None for contender in report.contenders for row in contender["lengths"])


class Clock:
    """What goes by in calls of `fake` contenders, and nothing else."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


def fake(name: str, seconds, fails_at: int | None = None) -> SimpleNamespace:
    """A contender whose call takes `seconds(n)` of CLOCK and returns zeros, and the lengths it was called with."""

    def make(q, k, v, threads, causal):
        n = q.shape[2]

        def call():
            if n == fails_at:
                raise RuntimeError(f"no memory for {n}\nand a second line")
            called.append(n)
            CLOCK.now += seconds(n)

        return Contender(call, lambda: np.zeros_like(q))

    called = []
    entry = Entry(name, name, "test", make)
    return SimpleNamespace(entry=entry, called=called)


@pytest.fixture
def rivals(monkeypatch):
    """Puts contenders in the place of all others, and CLOCK in that of the system's."""
    monkeypatch.setattr(scaling, "time", CLOCK)
    monkeypatch.setattr(scaling, "interleaved", partial(interleaved, clock=CLOCK.perf_counter))

    def put(*fakes):
        monkeypatch.setattr(scaling, "entries", lambda causal, where: [one.entry for one in fakes])

    return put


def test_who_would_be_too_slow_is_not_called(rivals):
    """5 calls of (n / 64)^2 ms fit into 60 ms at n = 128 (20 ms), and would not at 512; the other one goes on."""
    slow, quick = fake("slow", lambda n: (n / 64) ** 2 / 1e3), fake("quick", lambda n: 1e-6)
    rivals(slow, quick)
    first, second = sweep([64, 128, 512], heads=1, seconds=0.06).contenders
    assert first["stopped"]["n"] == 512
    assert first["stopped"]["reason"] == "5 calls would take 0.32 s by the shorter lengths, more than 0.06 s"
    assert [row["n"] for row in first["lengths"]] == [64, 128]
    assert set(slow.called) == {1, 64, 128}
    assert second["stopped"] is None
    assert first["fit"]["lengths"] == [64, 128]
    assert first["fit"]["exponent"] == pytest.approx(2.0)


def test_who_is_too_slow_at_once_is_called_once(rivals):
    slow = fake("slow", lambda n: 0.02 * (n > 1))
    rivals(slow)
    (found,) = sweep([64, 128], heads=1, seconds=0.05).contenders
    assert found["lengths"] == []
    assert found["fit"] is None
    assert found["stopped"]["reason"] == "a call took 0.02 s; 5 of them are more than 0.05 s"
    assert slow.called.count(64) == 1
    assert 128 not in slow.called


def test_who_fails_is_stopped_with_the_reason(rivals):
    rivals(fake("failing", lambda n: 1e-6, fails_at=64), fake("other", lambda n: 1e-6))
    first, second = sweep([32, 64], heads=1).contenders
    assert first["stopped"] == {"n": 64, "reason": "no memory for 64 and a second line"}
    assert [row["n"] for row in second["lengths"]] == [32, 64]


def test_who_would_need_too_much_memory_is_not_called(monkeypatch, rivals):
    hungry = fake("hungry", lambda n: 1e-6)
    rivals(hungry)
    monkeypatch.setattr(scaling, "_memory", lambda *_: 10**6)
    monkeypatch.setattr(scaling.psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * 10**6))
    (found,) = sweep([32, 64, 256], heads=1).contenders
    assert found["stopped"] == {
        "n": 256,
        "reason": "a call could need 0.016 GB by the last length, and 0.01 GB are free",
    }
    assert 256 not in hungry.called


def test_times_near_the_overhead_are_not_fitted(rivals):
    """A call of one key takes 1 ms: 3 ms at n = 32 say little of it, 20 and 80 ms do."""
    rivals(fake("a", lambda n: {1: 1, 32: 3, 64: 20, 128: 80}[n] / 1e3))
    (found,) = sweep([32, 64, 128], heads=1).contenders
    assert found["overhead_ms"] == pytest.approx(1)
    assert found["fit"]["lengths"] == [64, 128]


def test_a_package_that_is_not_there_is_named(monkeypatch):
    def absent(*_, **__):
        raise ModuleNotFoundError("No module named 'performer_pytorch'", name="performer_pytorch")

    monkeypatch.setattr(contenders.baselines, "performer", absent)
    report = sweep([16], heads=1, strategies=["exact", "Performer"])
    (one,) = (one for one in report.left_out if one["name"] == "Performer")
    assert one["reason"] == "performer_pytorch is not installed: pip install performer-pytorch"
    with pytest.raises(QexportError, match="Performer: performer_pytorch is not installed"):
        sweep([16], heads=1, strategies=["Performer"])


@alone
def test_extra_memory_is_what_a_call_takes_and_gives_back():
    ours = extra_rss(lambda: np.ones(20 << 20, np.uint8).sum())
    if ours is None:
        pytest.skip("this system does not tell")
    nothing = extra_rss(lambda: None)
    # Linux adds up what its processors count on their own some pages at a time, more where it has more processors
    assert 17 << 20 <= ours < 24 << 20, ours
    assert nothing < 3 << 20, nothing


@alone
def test_attention_that_holds_all_scores_needs_their_memory():
    """onnxruntime's Attention has scores of n x n numbers for every head, QuantumAttention has not."""
    report = sweep([768], heads=4, strategies=["exact", "Attention"], seconds=60.0)
    found = {contender["name"]: contender["lengths"][0]["memory_bytes"] for contender in report.contenders}
    if found["Attention"] is None:
        pytest.skip("this system does not tell")
    assert found["Attention"] > 768 * 768 * 4 * 2, found
    assert found["exact fp32"] < 768 * 768 * 4 * 2, found


@pytest.fixture
def heads(tmp_path):
    """Six heads in a file, each filled with its number: the output of the first one is 0, and its error no number."""
    x = np.broadcast_to(np.arange(6.0, dtype=np.float32).reshape(2, 3, 1, 1), (2, 3, 20, 8)).copy()
    np.savez(tmp_path / "heads.npz", q=x, k=x, v=x)
    return tmp_path / "heads.npz"


def test_activations_are_heads_of_the_file(heads):
    q, _, v = Activations(heads, heads=3, longest=20)(10)
    assert q.shape == (1, 3, 10, 8)
    assert v[0, :, 0, 0].tolist() == [0, 2, 5]
    report = sweep([16], heads=3, activations=heads, strategies=["stratified"])
    assert report.settings["head_size"] == 8
    assert report.settings["inputs"] == str(heads)
    (row,) = report.contenders[0]["lengths"]
    assert row["bound"] is row["error_mean"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lengths", "32", "--heads", "7"], ["holds 6 heads of 20 positions", "7 heads of 32"]),
        (["--lengths", "4", "--strategies", "exact,best"], ["no strategy 'best'; known: exact, default"]),
        (["--lengths", "10000000000"], ["lengths: the inputs of length 10000000000 need about", "GB are free"]),
        (["--threads", "99999"], ["threads must be at most", "got 99999; lower it"]),
        (["--seconds", "0"], ["seconds must be a positive number, got 0.0"]),
        (["--plot", "picture.jpeg"], ["picture.jpeg: a plot ends in .png, .svg, .pdf"]),
        (["--plot", "nowhere/picture.png"], ["there is no folder"]),
        (["--plot", "folder.png"], ["folder.png: a folder is there"]),
    ],
)
def test_what_is_wrong_is_one_line(heads, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    done = CliRunner().invoke(command, ["--activations", str(heads), *options])
    assert isinstance(done.exception, UsageError)
    assert "\n" not in str(done.exception)
    for word in words:
        assert word in str(done.exception)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (None, "No such file"),
        (b"text", "not an .npz file with arrays q, k and v"),
        (b"", "not an .npz file with arrays q, k and v"),
        ({"q": np.zeros((4, 8)), "k": np.zeros((4, 8))}, "no array v; needs q, k and v"),
        ({name: np.zeros((4, 8), int) for name in "qkv"}, "must be floats of one shape"),
        ({"q": np.zeros((4, 8)), "k": np.zeros((4, 8)), "v": np.zeros((5, 8))}, "must be floats of one shape"),
        ({name: np.array([{}]) for name in "qkv"}, "not an .npz file with arrays q, k and v"),
        ({name: np.zeros((4, 0, 8)) for name in "qkv"}, "must be floats of one shape"),
        ({name: np.full((1, 4, 8), 1e39) for name in "qkv"}, "not finite in float32"),
    ],
)
def test_a_file_of_something_else(tmp_path, arrays, words):
    file = tmp_path / "file.npz"
    if isinstance(arrays, bytes):
        file.write_bytes(arrays)
    elif arrays is not None:
        np.savez(file, **arrays)
    with pytest.raises(QexportError, match=words):
        sweep([4], heads=1, activations=file)


def test_no_matplotlib_is_said_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(scaling, "entries", lambda causal, where: pytest.fail("measured"))
    with pytest.raises(QexportError, match=r"needs matplotlib: pip install 'qexport\[plot\]'"):
        sweep([4], plot=tmp_path / "a.png")


def test_figures_that_are_missing_are_not_drawn(tmp_path):
    """Memory behind CUDA is not measured, errors of values of 0 are not finite."""
    found = sweep([16, 32], heads=1, strategies=["exact"], seconds=60.0).to_dict()
    for contender in found["contenders"]:
        for row in contender["lengths"]:
            row |= {"memory_bytes": None, "error_mean": None, "bound": None}
    plot.draw(found, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count(": no figures -->") == 2
    assert "<!-- time of a call, ms -->" in drawn


def test_command_prints_and_draws(tmp_path):
    picture = tmp_path / "scaling.svg"
    arguments = ["--lengths", "16,64", "--heads", "1", "--strategies", "exact,naive,Attention,GroupQueryAttention"]
    done = CliRunner().invoke(command, [*arguments, "--plot", str(picture), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["schema"], report["schema_version"]) == ("qexport.scaling", 1)
    names = [contender["name"] for contender in report["contenders"]]
    assert {"exact fp32", "naive 32", "Attention"} <= set(names)
    drawn = picture.read_text()
    for name in [*names, "bound of naive 32", "1 head of 64"]:
        assert f"<!-- {name}" in drawn, name
    done = CliRunner().invoke(command, [*arguments, "-v"])
    assert done.exit_code == 0
    for text in (*names, "quartiles", "GroupQueryAttention was left out: it is always causal"):
        assert text in done.stdout


def test_every_strategy_has_a_colour_and_every_member_a_marker():
    for causal in (False, True):
        everybody = [{"name": e.name, "strategy": e.family, "provider": e.provider} for e in contenders.entries(causal, {})]
        styles = plot._styles(everybody)
        assert len({(style["color"], style["marker"], style["ls"]) for style in styles.values()}) == len(everybody)
