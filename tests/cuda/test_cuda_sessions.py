"""The ops in sessions of onnxruntime's CUDA provider, beside sessions on the CPU."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from attention_backends import DTYPES, one_node_model
from attention_cases import CASES
from bundle_factory import make_bundle
from onnx import TensorProto, helper
from summary_cases import cache, queries, relative, run, zeros
from test_key_summary import model as decode_model
from test_ops import SAMPLES, allowed_flips, assert_close

from qexport import installed, runtime
from qexport.ops.proto import make_node
from qexport.ops.strategies import STRATEGIES
from qexport.profiling.calls import make_call

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DEVICE = ("cuda", 0)


def open_session(model, provider=CUDA, trace=None, **provider_options):
    options = runtime.quiet_options()
    if trace:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
    runtime.register_library(options, installed.get_library_path())
    providers = runtime.check_providers([(provider, provider_options)])
    return runtime.create_session("test", model.SerializeToString(), options, providers, True)


def run_on_cuda(model, feed, tmp_path):
    """The outputs, and a check that CUDA has run the op."""
    session = open_session(model, trace=tmp_path / "trace")
    found = session.run(None, feed)
    with open(session.end_profiling()) as file:
        events = json.load(file)
    ops = [e["args"] for e in events if e["name"].endswith("_kernel_time") and e["args"]["op_name"] not in ("Cast",)]
    ours = {args["provider"] for args in ops if not args["op_name"].startswith("Memcpy")}
    assert ours == {CUDA}
    return found


def row_model(op, inputs, outputs, **attributes):
    """One node on arrays of numpy; an input that is None is left out."""
    element = helper.np_dtype_to_tensor_dtype
    given = {name: array for name, array in inputs.items() if array is not None}
    node = make_node(op, [name if name in given else "" for name in inputs], outputs, **attributes)
    ends = [helper.make_tensor_value_info(name, element(array.dtype), list(array.shape)) for name, array in given.items()]
    kind = element(next(iter(given.values())).dtype)
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT if name == "leak" else kind, None) for name in outputs]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.qexport", 1)]
    return helper.make_model(helper.make_graph([node], "g", ends, made), opset_imports=opsets, ir_version=10), given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(case, strategy, dtype, tmp_path):
    feed = {**case.inputs(), "seed": np.array(5)}
    given = {name: array for name, array in feed.items() if name != "seed"}
    model = one_node_model(given, dtype, ["Y"], case.all_attributes(strategy=strategy, num_samples=SAMPLES))
    want = open_session(model, CPU).run(None, feed)[0]
    flips = allowed_flips(case.batch * case.q_heads * case.q_len, SAMPLES, case.past_len + case.kv_len)
    assert_close(run_on_cuda(model, feed, tmp_path)[0], want, dtype, "Y", flips)


def unitary(states):
    rng = np.random.default_rng(3)
    u = np.linalg.qr(rng.standard_normal((states, states)) + 1j * rng.standard_normal((states, states)))[0]
    return np.stack([u.real, u.imag], -1).astype(np.float32)


@pytest.mark.parametrize(
    "given", [{}, {"unitary": unitary(2)}, {"unitary": unitary(16)}], ids=["channel", "gate", "unitary"]
)
def test_noise_with_its_channel_in_host_memory(given, tmp_path):
    p = np.random.default_rng(0).dirichlet(np.ones(16), (3, 5)).astype(np.float32)
    names = ("probabilities", "level", "T1", "T2", "excited_population", "kraus", "unitary")
    inputs = {name: given.get(name) for name in names} | {"probabilities": p, "level": np.array(0.1, np.float32)}
    model, feed = row_model("QuantumNoise", inputs, ["noisy", "leak"])
    for found, want in zip(run_on_cuda(model, feed, tmp_path), open_session(model, CPU).run(None, feed), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_measure_and_a_row_that_is_no_distribution(tmp_path):
    p = np.random.default_rng(1).dirichlet(np.ones(50), 8)
    model, feed = row_model("QuantumMeasure", {"probabilities": p, "seed": np.array(3)}, ["frequencies"], shots=500)
    np.testing.assert_array_equal(run_on_cuda(model, feed, tmp_path)[0], open_session(model, CPU).run(None, feed)[0])
    p[2] *= 2
    frequencies = open_session(model).run(None, feed)[0]
    assert np.isnan(frequencies[2]).all()
    assert np.isfinite(np.delete(frequencies, 2, 0)).all()


@pytest.mark.parametrize("op", ["MPSDecode", "MPSAttention", "MPOLinear"])
def test_trains(op, tmp_path):
    rng = np.random.default_rng(2)
    train = {"rows": 60, "cols": 63, "row_factors": [4, 4, 4], "col_factors": [4, 2, 8], "bonds": [1, 8, 8, 1]}
    cores = rng.standard_normal(4 * 4 * 8 + 8 * 4 * 2 * 8 + 8 * 4 * 8) / 4
    inputs = {
        "MPSDecode": {"cores": cores},
        "MPSAttention": {"cores": cores, "V": rng.standard_normal((2, 63, 20))},
        "MPOLinear": {"x": rng.standard_normal((30, 60)), "cores": cores, "bias": rng.standard_normal(63)},
    }[op]
    model, feed = row_model(op, inputs, ["y"], **train)
    want = open_session(model, CPU).run(None, feed)[0]
    np.testing.assert_allclose(run_on_cuda(model, feed, tmp_path)[0], want, rtol=1e-10, atol=1e-10)


def attention_model(strategy, length):
    rng = np.random.default_rng(4)
    feed = {name: rng.standard_normal((1, 4, length, 64)).astype(np.float32) for name in ("Q", "K", "V")}
    attributes = {"strategy": strategy, "num_samples": [64]}
    return one_node_model(feed, "float32", ["Y"], attributes), feed | {"seed": np.array(0)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_captured_graph_reads_inputs_and_seed_again(strategy):
    model, feed = attention_model(strategy, 600)
    session, cpu = open_session(model, enable_cuda_graph="1"), open_session(model, CPU)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, *DEVICE) for name, array in feed.items()}
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([1, 4, 600, 64], np.float32, *DEVICE)
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("Y", y)
    found = {}
    for seed in (1, 1, 2, 1):
        values["seed"].update_inplace(np.array(seed))
        session.run_with_iobinding(binding)
        again = found.setdefault(seed, y.numpy().copy())
        np.testing.assert_array_equal(y.numpy(), again)
        if strategy != "tree":  # its clusters are larger on a GPU
            want = cpu.run(None, feed | {"seed": np.array(seed)})[0]
            assert_close(again, want, "float32", "Y", allowed_flips(4 * 600, 64, 600))
    draws = strategy in ("naive", "stratified", "adaptive")  # the others choose, where no mask is causal
    assert np.array_equal(found[1], found[2]) == (not draws)


def test_a_captured_graph_decodes_with_its_state_in_place():
    """Over steps that fill chunks and a cache that is cut back; then with a state that is only read."""
    k, v = cache(41, n=50000, size=64, v_size=64)
    feed = {"q": queries(41, k, 4), "k": k, "v": v, "nonpad": np.array([50000]), "key_summary": zeros(k, v)}
    model = decode_model(k, v, ["y", "present_key_summary"])
    session, cpu = open_session(model, enable_cuda_graph="1"), open_session(model, CPU)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, *DEVICE) for name, array in feed.items()}
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([1, 4, 1, 64], np.float32, *DEVICE)
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("y", y)
    binding.bind_ortvalue_output("present_key_summary", values["key_summary"])
    for length in (48657, 49169, 600, 50000):  # none fills a chunk itself, which the CPU would make anew
        values["nonpad"].update_inplace(np.array([length]))
        session.run_with_iobinding(binding)
        state = values["key_summary"].numpy()
        given = feed | {"nonpad": np.array([length]), "key_summary": state}
        want, kept = cpu.run(None, given)
        np.testing.assert_array_equal(state, kept)
        assert_close(y.numpy(), want, "float32", "Y")
    assert relative(y.numpy(), run(feed["q"], k, v, [50000])[0]) > 1e-3
    read_only = open_session(decode_model(k, v, ["y"])).run(None, feed | {"key_summary": state})[0]
    np.testing.assert_array_equal(read_only, y.numpy())


def test_runs_at_the_same_time_share_no_scratch_memory():
    model, feed = attention_model("stratified", 1100)
    session = open_session(model)
    alone = session.run(None, feed)[0]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: session.run(None, feed)[0], range(200)):
            np.testing.assert_array_equal(found, alone)


def test_profile_keeps_tensors_on_the_device(tmp_path):
    make_bundle(tmp_path / "b")
    session = runtime.session(tmp_path / "b", providers=[CUDA])
    feed = {"input_ids": np.arange(10)[None], "attention_mask": np.ones((1, 10), np.int64)}
    call = make_call(session, feed, [])
    call()
    assert {value.device_name() for value in call.values.values()} == {"cuda"}
