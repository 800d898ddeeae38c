"""--provider and --allow-fallback of every command that runs sessions: they reach each one, and nothing is left where they
cannot be had."""

import json

import numpy as np
import pytest
from bundle_factory import make_text_bundle
from cli_cases import assert_one_line
from fake_gpu import CPU, CUDA
from test_completion import complete

import qexport as package
from qexport import cuda_checks, deployment, profiling, providers, runtime, validation
from qexport.bundle import Bundle
from qexport.cuda_checks import provider_obstacle
from qexport.deployment import run as program
from qexport.errors import QexportError, UsageError
from qexport.feeds import Inputs
from qexport.ops.key_summary import key_summary_shape
from qexport.providers import device, full_names, option_words, recorded, uses_tf32
from qexport.scaling import nodes
from qexport.tuning import measurement, watched_sites
from qexport.tuning.settings import Setting
from qexport.validation.limits import ROUNDING, limits_of, rounding_of

# Commands that run a bundle, quick ones; a file or folder that one would write is called OUT.
COMMANDS = {
    "validate": ["validate", "DIR", "--seeds", 2, "--max-error", "500%"],
    "profile": ["profile", "DIR", "--seq", 8, "--runs", 2, "--warmup", 0],
    "tune": ["tune", "DIR", "--max-error", "90%", "--trials", 3, "--seeds", 1, "-o", "OUT.yaml"],
    "attention": ["attention", "DIR", "--text", "the cat sat", "--no-pictures", "-o", "OUT"],
    "resilience": ["resilience", "DIR", "--levels", "0.01", "--shots", "64", "--seeds", 1],
    "scaling": ["scaling", "--lengths", 16, "--heads", 1, "--strategies", "exact,tree,MultiHeadAttention", "--seconds", 60],
    "report": [
        "report",
        "DIR",
        "-o",
        "OUT.html",
        "--seq",
        8,
        "--runs",
        2,
        "--max-error",
        "500%",
        "--skip",
        "profile",
        "--skip",
        "scaling",
    ],
}
WRITE_FIRST = {"demo": ["demo", "-o", "OUT"]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_text_bundle(tmp_path_factory.mktemp("providers") / "bundle")


@pytest.fixture
def run(qexport, bundle, tmp_path):
    """Runs a command of COMMANDS with further words; what it writes goes to an empty folder."""

    def run(name, *more):
        words = [bundle if word == "DIR" else word for word in (COMMANDS | WRITE_FIRST)[name]]
        words = [tmp_path / word if str(word).startswith("OUT") else word for word in words]
        return qexport(*words, *more)

    return run


def settings_of(document: dict) -> list[dict]:
    """The settings of a document, and of the parts of a report that were measured."""
    parts = document.get("parts", {})
    return [document["settings"], *(parts[name]["settings"] for name in ("validate", "samples") if name in parts)]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_asked_for_reaches_every_session(name, run, fake_gpu, monkeypatch):
    """A session that was not told to fall back would end the command."""
    memory = dict.fromkeys(("before_bytes", "loaded_bytes", "peak_bytes", "timeline", "profile")) | {"load_seconds": 0.0}
    monkeypatch.setattr(profiling, "model_memory", lambda *arguments: memory)  # a process of its own, without a fake
    monkeypatch.setattr("qexport.reporting.parts.doctor", list)  # which looks at the CPU, too
    code, out, err = run(name, "--provider", "cuda", "--allow-fallback", "--json")
    assert code == 0, err
    assert len(fake_gpu) > 1
    assert fake_gpu == [([CUDA], False)] * len(fake_gpu)
    found = settings_of(json.loads(out))
    assert [(s["providers"], s["allow_fallback"]) for s in found] == [([CUDA], True)] * len(found)


@pytest.mark.parametrize("name", [*COMMANDS, *WRITE_FIRST])
def test_without_kernels_nothing_is_written(name, run, fake_gpu, tmp_path):
    assert_one_line(*run(name, "--provider", CUDA), "the kernels are missing; build them", "--allow-fallback")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*COMMANDS, *WRITE_FIRST])
def test_cuda_that_is_not_there_is_one_line(name, run, tmp_path):
    obstacle = provider_obstacle()
    if obstacle is None:
        pytest.skip("CUDA works on this machine")
    code, out, err = run(name, "--provider", "cuda")
    assert_one_line(code, out, err, CUDA, obstacle.found, obstacle.mend, expected=code)
    assert code in (1, 2)  # 2: not in this onnxruntime
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, [CPU]),
        ("cuda", [CUDA]),
        (["cuda", "cpu"], [CUDA, CPU]),
        ([("cuda", {"device_id": 1}), CPU], [(CUDA, {"device_id": 1}), CPU]),
        ([["CUDAExecutionProvider", {}]], [(CUDA, {})]),  # as JSON has it
        (("OtherExecutionProvider",), ["OtherExecutionProvider"]),
    ],
)
def test_names(given, found):
    assert full_names(given) == found
    assert full_names(found) == found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "providers must name at least one, or be None for the CPU"),
        (["cuda", (CUDA, {})], f"provider {CUDA} is given twice; name each once"),
        (["cpu", "cuda"], f"provider {CPU} comes before {CUDA} and would run every node; name it last"),
        ([7], "a provider is a name or a pair of a name and a dict of options, got 7"),
        ([("cuda", "device_id=1")], "a provider is a name or a pair"),
        (["CUDA"], "provider 'CUDA' is not in this onnxruntime; available: .*; for short: cpu, cuda"),
    ],
)
def test_what_may_not_be_asked(given, says, bundle):
    for ask in (package.session, package.validate, package.tune):
        with pytest.raises(UsageError, match=says):
            ask(bundle, providers=given, **({"max_error": 0.1} if ask is package.tune else {}))


def test_a_provider_in_words():
    assert device([CUDA]) == ("cuda", 0)
    assert device([(CUDA, {"device_id": "2"}), CPU]) == ("cuda", 2)
    assert device([CPU]) == device(["OtherExecutionProvider", CUDA]) == ("cpu", 0)
    assert option_words(recorded(None, False)) == option_words({}) == []
    asked = recorded([("cuda", {}), "cpu"], True)
    assert option_words(asked) == ["--provider", CUDA, "--provider", CPU, "--allow-fallback"]


def test_the_shell_completes_providers():
    assert complete("tune", "d", "--provider", "cu") == [("plain", "cuda")]
    assert complete("bundle", "d", "--provider", "C") == [("plain", CPU), ("plain", CUDA)]


def test_a_deployment_takes_both_names_of_what_its_program_runs(bundle, tmp_path, monkeypatch):
    assert {name: providers.SHORT[name] for name in deployment.PROVIDERS} == program.PROVIDERS
    for name in ("cpu", CPU):
        assert package.pack_deployment(bundle, tmp_path / name, provider=name)["provider"] == "cpu"
    monkeypatch.setitem(providers.SHORT, "other", "OtherExecutionProvider")
    with pytest.raises(UsageError, match="provider must be cpu or cuda, got 'other'"):
        package.pack_deployment(bundle, tmp_path / "other", provider="other")


def test_options_reach_the_sessions_of_functions(bundle, monkeypatch):
    import onnxruntime

    asked, real = [], onnxruntime.InferenceSession

    def opened(source, options, **more):
        asked.append(more["providers"])
        return real(source, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    given = [("cpu", {"use_arena": "0"})]
    package.validate(bundle, seeds=1, max_error=5.0, providers=given)
    package.measure_resilience(bundle, levels=[0.01], shots=["inf"], providers=given)
    assert len(asked) > 8
    assert asked == [[(CPU, {"use_arena": "0"})]] * len(asked)


def test_tf32_is_rounding(bundle, monkeypatch):
    """CUDA's float32 may have the mantissa of float16, unless it is told otherwise, and has its limits in validate."""
    asked = ("cuda", [("cuda", {"device_id": 1}), CPU], [("cuda", {"use_tf32": 0})], None)
    assert [uses_tf32(providers) for providers in asked] == [True, True, False, False]
    assert [rounding_of(t, True) for t in ("float32", "float64", "bfloat16")] == [
        ROUNDING[t] for t in ("float16", "float64", "bfloat16")
    ]
    opened = Bundle.open(bundle)
    limits = limits_of(opened, ["float32"], None, 1e-4, True, tf32=True)
    assert (limits["library"], limits["fallback"], limits["sites"]) == (1e-4, ROUNDING["float16"], ROUNDING["float16"])
    monkeypatch.setattr(validation, "uses_tf32", lambda providers: True)
    report = validation.validate(opened, seeds=1, max_error=5.0)
    assert report.max_error["fallback"] == ROUNDING["float16"]
    assert report.notes[-1].startswith("CUDA may make products of float32 in TF32: errors up to 0.005")


def test_a_sweep_on_a_gpu(fake_gpu, monkeypatch):
    """onnxruntime may place nothing on the CPU that would be timed under the GPU's name; memory is not this process's."""
    monkeypatch.setattr(cuda_checks, "plugin_obstacle", lambda library: None)
    report = package.sweep([16], heads=1, strategies=["exact", "Attention"], providers=["cuda", "cpu"])
    assert fake_gpu[0] == ([CUDA, CPU], False)  # the check that it starts
    assert fake_gpu[1:] == [([CUDA], True)] * (len(fake_gpu) - 1)
    assert [one["name"] for one in report.contenders] == ["exact fp32", "Attention"]
    assert [one["name"] for one in report.left_out] == ["exact bf16", "exact int8"]
    assert all(row["memory_bytes"] is None for one in report.contenders for row in one["lengths"])


def cache_step(where):
    """GroupQueryAttention on a cache of 8 entries, 6 of them filled."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 8, 16), dtype=np.float32)
    return nodes.group_query_attention(q[:, :, 6:7], k, v, 1, past_len=6, where=where)


def summary_step(where):
    """QuantumAttention on a cache with a key_summary."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 2100, 16), dtype=np.float32)
    summary = np.zeros(key_summary_shape(*k.shape, v.shape[-1]), np.float32)
    extra = {"nonpad_kv_seqlen": np.array([2100]), "key_summary": summary}
    more = {"strategy": "tree", "num_samples": [64]}
    return nodes.quantum(q[:, :, -1:], k, v, 1, causal=True, flat=False, extra=extra, where=where, **more)


@pytest.mark.parametrize(
    ("step", "shared"),
    [
        (cache_step, {"past_key": "present_key", "past_value": "present_value"}),
        (summary_step, {"key_summary": "present_key_summary"}),
    ],
)
def test_what_is_updated_in_place_has_one_memory_on_a_device(step, shared, fake_gpu, monkeypatch):
    """Else a step would be timed with the copy of its whole cache."""
    bound, run = [], nodes.run_bound
    monkeypatch.setattr(nodes, "run_bound", lambda session, binding: (bound.append(binding), run(session, binding)))
    contenders = [step({"providers": [name]}) for name in ("cuda", "cpu")]
    for contender in contenders:
        contender.call()
    np.testing.assert_array_equal(contenders[0].output(), contenders[1].output())
    for binding in bound:
        addresses = binding.addresses
        assert {name: addresses[name] for name in shared} == {name: addresses[other] for name, other in shared.items()}
        assert len(set(addresses.values())) == len(addresses) - len(shared)


def test_nodes_timed_by_themselves(bundle, monkeypatch):
    """As on a GPU, whose kernels the trace does not see: the errors stay, and more work takes longer."""
    opened, rng = Bundle.open(bundle), np.random.default_rng(0)
    feeds = [{"input_ids": rng.integers(0, 50, (16, n)), "attention_mask": np.ones((16, n), np.int64)} for n in (30, 64)]
    sites = watched_sites(opened)
    settings = [[Setting(), Setting("stratified", (4,)), Setting("naive", (48,))]] * len(sites)
    given = opened, Inputs(feeds, "test"), feeds[1], sites, settings, 1
    steps = []
    traced = measurement.measure(*given)
    monkeypatch.setattr(measurement, "CPU", "no provider")
    alone = measurement.measure(*given, progress=steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    for one, other in zip(traced, alone, strict=True):
        np.testing.assert_array_equal(one.squares, other.squares)
        assert (other.times > 0).all()
        assert other.times[2] > other.times[1]  # twelve times as many draws


def test_a_failed_provider_is_not_replaced(monkeypatch, bundle):
    """onnxruntime would go on with another one, and say so on stdout alone."""
    session = runtime.session(bundle)
    assert session._enable_fallback is False
    with pytest.raises(QexportError, match="is not in this onnxruntime"):
        runtime.check_start(["NoProvider"])
