"""The op library as a file: what it exports, where it loads, what it says to wrong models and inputs."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort
import platformdirs
import pytest
from cpu_sessions import cpu_session
from instruction_sets import ISAS
from onnx import TensorProto, helper

from qexport import _core
from qexport.installed import get_library_path, version_tuple
from qexport.ops.proto import make_node
from qexport.ops.quantum_attention import SPEC
from qexport.ops.strategies import STRATEGIES

# The oldest that is supported, the last ones on each side of a change that the library works around, and the newest.
RUNTIMES = ("1.20.1", "1.23.2", "1.24.4", "1.28.0", "1.32.0")
INFERS_SHAPES = (1, 28)
TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
SHAPES = {
    "Q": ["batch", 4, "q", 8],
    "K": ["batch", 2, "kv", 8],
    "V": ["batch", 2, "kv", 6],
    "attn_mask": ["batch", 1, "q", "kv"],
    "past_key": ["batch", 2, "past", 8],
    "past_value": ["batch", 2, "past", 6],
    "nonpad_kv_seqlen": ["batch"],
    "seed": [],
}
INPUTS = tuple(param.name for param in SPEC.inputs)
# "" in the middle is where some runtimes stumble.
GIVEN = (
    ("Q", "K", "V"),
    ("Q", "K", "V", "attn_mask"),
    ("Q", "K", "V", "past_key", "past_value", "seed"),
    ("Q", "K", "V", "nonpad_kv_seqlen", "seed"),
)


def attention_model(
    given, float_type=TensorProto.FLOAT, outputs=("Y", "present_key", "present_value"), edit=None, **attributes
):
    """A model of one QuantumAttention node with the inputs named in `given`; `edit` changes the node before it is used."""
    types = {"attn_mask": TensorProto.BOOL, "nonpad_kv_seqlen": TensorProto.INT64, "seed": TensorProto.INT64}
    node = make_node("QuantumAttention", [name if name in given else "" for name in INPUTS], list(outputs), **attributes)
    if edit is not None:
        edit(node)
    values = [helper.make_tensor_value_info(n, types.get(n, float_type), SHAPES[n]) for n in given]
    results = [helper.make_tensor_value_info(n, float_type, None) for n in outputs]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.qexport", 1)]
    graph = helper.make_graph([node], "g", values, results)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def feeds_for(given, dtype=np.float32):
    """Random inputs: batch 2, 4 query and 2 kv heads, 5 queries, 7 keys, 3 past keys."""
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "q": 5, "kv": 7, "past": 3}
    feeds = {name: rng.standard_normal([sizes.get(d, d) for d in SHAPES[name]]).astype(dtype) for name in INPUTS[:6]}
    feeds["attn_mask"] = feeds["attn_mask"] > -0.5
    feeds["nonpad_kv_seqlen"] = np.array([4, 7])
    feeds["seed"] = np.array(11)
    return {name: feeds[name] for name in given}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Path of a pickle with (model, feeds, outputs of this process) for every strategy, type and set of inputs."""
    cases = []
    for float_type, dtype in TYPES.items():
        for strategy in STRATEGIES:
            for given in GIVEN:
                model = attention_model(given, float_type, strategy=strategy, num_samples=3)
                feeds = feeds_for(given, dtype)
                cases.append((model, feeds, cpu_session(model).run(None, feeds)))
    path = tmp_path_factory.mktemp("models") / "models.pickle"
    path.write_bytes(pickle.dumps(cases))
    return path


# Runs the models of a pickle in whatever onnxruntime and instruction set the process finds; the last line is the largest
# difference from the stored outputs.
WORKER = """
import pickle, sys
import numpy as np, onnxruntime as ort
worst = 0.0
for model, feeds, expected in pickle.load(open(sys.argv[2], "rb")):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(sys.argv[1])
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for got, want in zip(session.run(None, feeds), expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        worst = max(worst, float(np.abs(got.astype(np.float64) - want).max()))
print(ort.__version__, worst)
"""


def run_worker(models, **env):
    command = [sys.executable, "-c", WORKER, get_library_path(), str(models)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False)


def runtime_folder(version):
    """The unpacked wheel of an onnxruntime, in the user's cache."""
    folder = platformdirs.user_cache_path("qexport") / "runtimes" / f"{version}-cp{sys.version_info[0]}{sys.version_info[1]}"
    if (folder / "onnxruntime").is_dir():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as own:  # other processes may be at it, too
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", own]
        done = subprocess.run([*pip, f"onnxruntime=={version}"], capture_output=True, text=True, timeout=300, check=False)
        wheels = list(Path(own).glob(f"onnxruntime-{version}-*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"pip cannot get onnxruntime {version} for this Python: {reason}")
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(own)
        try:
            Path(own, "onnxruntime").rename(folder / "onnxruntime")
        except OSError:
            assert (folder / "onnxruntime").is_dir()  # another process was faster
    return folder


@pytest.mark.registry
@pytest.mark.parametrize("version", RUNTIMES)
def test_loads_and_agrees_on_every_runtime(models, version):
    done = run_worker(models, PYTHONPATH=str(runtime_folder(version)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [version, "0.0"]  # the same kernels: equal to the last bit


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees(models, isa):
    done = run_worker(models, QEXPORT_ISA=isa)
    if done.returncode and "does not have" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr[-2000:]
    # Differences of rounding; the draws are the same. float16 outputs near 4 have steps of 2^-9.
    assert float(done.stdout.split()[1]) <= 2**-8


def test_unknown_instruction_set_lists_the_choices(models):
    done = run_worker(models, QEXPORT_ISA="mmx")
    assert done.returncode != 0
    assert "QEXPORT_ISA must be" in done.stderr
    assert _core.isa() in done.stderr


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_threads_do_not_change_a_bit(strategy):
    rng = np.random.default_rng(1)
    feeds = {n: rng.standard_normal((2, h, 150, s), dtype=np.float32) for n, h, s in (("Q", 4, 8), ("K", 2, 8), ("V", 2, 6))}
    model = attention_model(("Q", "K", "V"), outputs=("Y",), strategy=strategy, num_samples=9)
    one, three = (cpu_session(model, threads=threads).run(None, feeds)[0] for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF")
def test_exports_one_symbol_and_needs_only_the_c_library():
    defined, needed = elf_symbols(get_library_path())
    assert defined == {"RegisterCustomOps"}
    assert {name.split(".so")[0] for name in needed} <= {
        "libc",
        "libm",
        "libpthread",
        "libdl",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }


def elf_symbols(path):
    """Names of the defined dynamic symbols of a 64-bit ELF file, and the libraries it needs."""
    with open(path, "rb") as file:
        data = file.read()
    assert data[:5] == b"\x7fELF\x02"
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]

    def name(strings, offset):
        start = sections[strings][4] + offset
        return data[start : data.index(b"\0", start)].decode()

    defined, needed = set(), set()
    for _, kind, _, _, offset, length, link, _, _, _ in sections:
        if kind == 11:  # SHT_DYNSYM
            for at in range(offset, offset + length, 24):
                string, info, _, index, _, _ = struct.unpack_from("<IBBHQQ", data, at)
                if index != 0 and info >> 4 != 0:
                    defined.add(name(link, string))
        if kind == 6:  # SHT_DYNAMIC
            for at in range(offset, offset + length, 16):
                tag, value = struct.unpack_from("<QQ", data, at)
                if tag == 1:  # DT_NEEDED
                    needed.add(name(link, value))
    return defined, needed


@pytest.mark.skipif(
    version_tuple(ort.__version__) < INFERS_SHAPES, reason="onnxruntime would crash on empty optional inputs"
)
@pytest.mark.parametrize("given", GIVEN)
def test_symbolic_shapes(given):
    shapes = [output.shape for output in cpu_session(attention_model(given)).get_outputs()]
    total = "past + kv" if "past_key" in given else "kv"
    assert shapes == [["batch", 4, "q", 6], ["batch", 2, total, 8], ["batch", 2, total, 6]]


@pytest.mark.parametrize("attribute", [attr.name for attr in SPEC.attributes if attr.default is not None])
def test_a_missing_attribute_is_named(attribute):
    def drop(node):
        kept = [a for a in node.attribute if a.name != attribute]
        del node.attribute[:]
        node.attribute.extend(kept)

    expected = rf"\[QuantumAttention\] attribute {attribute} is missing; make nodes with qexport\.ops\.proto\.make_node"
    with pytest.raises(Exception, match=expected):
        cpu_session(attention_model(("Q", "K", "V"), outputs=("Y",), edit=drop))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("num_samples", [0], r"num_samples must be > 0, got 0"),
        ("strategy", "quantum", r"strategy must be one of exact, naive, stratified, adaptive, hybrid, tree, got 'quantum'"),
        ("control_variate", 2, r"control_variate must be in 0 to 1, got 2"),
        ("layer", -1, r"layer must be in 0 to 4294967295, got -1"),
        ("is_causal", 3, r"is_causal must be in 0 to 1, got 3"),
        ("qk_matmul_output_mode", 4, r"qk_matmul_output_mode must be in 0 to 3, got 4"),
        ("left_window_size", -2, r"left_window_size must be >= -1, got -2"),
        ("softcap", -1.0, r"softcap must be >= 0 and finite, got -1"),
    ],
)
def test_a_wrong_attribute_is_one_line(attribute, value, message):
    def change(node):
        kept = [a for a in node.attribute if a.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(attribute, value)])

    with pytest.raises(Exception, match=rf"\[QuantumAttention\] {message}"):
        cpu_session(attention_model(("Q", "K", "V"), outputs=("Y",), edit=change))


def reshaped(name, *shape):
    return {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("given", "change", "attributes", "message"),
    [
        (GIVEN[0], reshaped("K", 3, 2, 7, 8), {}, r"K has shape \(3, 2, 7, 8\), expected the batch size of Q, 2"),
        (GIVEN[0], reshaped("V", 2, 2, 6, 6), {}, r"V has shape \(2, 2, 6, 6\), expected .* of K, \(2, 2, 7, 8\)"),
        (GIVEN[1], {"attn_mask": np.ones((2, 1, 5, 8), bool)}, {}, r"attn_mask has shape \(2, 1, 5, 8\), .*\(2, 4, 5, 7\)"),
        (GIVEN[1], {"attn_mask": np.ones((2, 1, 4, 7), bool)}, {}, r"attn_mask has shape \(2, 1, 4, 7\), .*\(2, 4, 5, 7\)"),
        (GIVEN[2], reshaped("past_value", 2, 2, 4, 6), {}, r"past_value has shape \(2, 2, 4, 6\), expected \(2, 2, 3, 6\)"),
        (GIVEN[3], {"nonpad_kv_seqlen": np.array([4])}, {}, r"nonpad_kv_seqlen has shape \(1,\), expected \(2,\)"),
        (GIVEN[0], {}, {"num_samples": [1, 2]}, r"num_samples must hold 1 number or one per query head \(4\), got 2"),
        (("Q", "K", "V", "past_key"), {}, {}, r"past_key and past_value must be given together"),
        (("Q", "K", "V", "past_key", "past_value", "nonpad_kv_seqlen"), {}, {}, r"nonpad_kv_seqlen cannot be combined"),
    ],
)
def test_a_wrong_input_is_one_line(given, change, attributes, message):
    # The model's own shapes are loosened to ranks, else onnxruntime would not let the arrays through to the op.
    session = cpu_session(attention_model(given, outputs=("Y",), **attributes))
    feeds = feeds_for(given) | change
    with pytest.raises(Exception, match=rf"\[QuantumAttention\] {message}") as caught:
        session.run(None, feeds)
    assert "\n" not in str(caught.value).strip()


def test_a_mask_of_integers_is_refused():
    model = attention_model(("Q", "K", "V"), outputs=("Y",), edit=lambda node: node.input.append("mask"))

    proto = onnx.load_from_string(model)
    proto.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.INT64, ["q", "kv"]))
    feeds = feeds_for(("Q", "K", "V")) | {"mask": np.ones((5, 7), np.int64)}
    with pytest.raises(
        Exception, match=r"\[QuantumAttention\] attn_mask must be float, float16, bfloat16 or bool, got int64"
    ):
        cpu_session(proto).run(None, feeds)
