"""Sessions: one clear line for whatever keeps a model from loading or running."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_factory import make_bundle
from onnx import TensorProto, helper

from qexport import installed, runtime
from qexport.errors import QexportError, UsageError


def small_model(op="Relu", domain="", opset=17, ir_version=8, weights=()) -> onnx.ModelProto:
    """x -> op -> y, both float (2,)."""
    node = helper.make_node(op, ["x", *(t.name for t in weights)], ["y"], domain=domain, name="the_node")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], initializer=weights)
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def external_model(location: str) -> onnx.ModelProto:
    """x @ w with w (2, 1000) in the file `location`, 8000 bytes."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 1000], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8000")):
        weight.external_data.add(key=key, value=value)
    return small_model("MatMul", weights=[weight])


def bfloat16_model():
    model = small_model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    return model


def error_of(path, **options) -> str:
    with pytest.raises(QexportError) as error:
        runtime.session(path, **{"library": False, **options})
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    assert "onnxruntime_src" not in text
    assert "[ONNXRuntimeError]" not in text
    return text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such model file"),
        (b"", "not an ONNX model"),
        (b"just some text that is not protobuf\n" * 9, "not an ONNX model"),
        (small_model().SerializeToString()[:40], "not an ONNX model, or cut short (40 bytes)"),
        (small_model("Frobnicate").SerializeToString(), "op Frobnicate of opset 17 is unknown"),
        (small_model("Frobnicate", "org.example").SerializeToString(), "op org.example:Frobnicate is unknown"),
        (small_model("QuantumAttention", "com.qexport").SerializeToString(), "no fallback function in the file"),
        (small_model(opset=99).SerializeToString(), "opset 99 is newer than onnxruntime"),
        (small_model(ir_version=99).SerializeToString(), "IR version 99 is newer than onnxruntime"),
        (bfloat16_model().SerializeToString(), "in the types of the model; where they are bfloat16, run it with"),
        (external_model("w.data").SerializeToString(), "missing"),
        (external_model("../outside.data").SerializeToString(), "outside"),
        (external_model("/etc/hostname").SerializeToString(), "outside"),
        (external_model("short.data").SerializeToString(), "w"),
    ],
    ids=[
        "missing",
        "empty",
        "text",
        "truncated",
        "unknown-op",
        "unknown-domain",
        "no-fallback",
        "opset",
        "ir",
        "bfloat16",
        "external-missing",
        "external-outside",
        "external-absolute",
        "external-short",
    ],
)
def test_what_does_not_load(tmp_path, content, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.data").write_bytes(bytes(8000))
    (folder / "short.data").write_bytes(bytes(100))
    path = folder / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    assert message in error_of(path)


def test_external_data_is_checked_for_runtimes_that_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "version_tuple", lambda text: (1, 20))
    (tmp_path / "outside.data").write_bytes(bytes(8000))
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(external_model("../outside.data").SerializeToString())
    assert "outside the folder of the model" in error_of(path)


def test_an_external_file_beside_the_model_loads(tmp_path):
    (tmp_path / "w.data").write_bytes(np.ones((2, 1000), np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(external_model("w.data").SerializeToString())
    session = runtime.session(tmp_path / "m.onnx", library=False)
    np.testing.assert_array_equal(runtime.run(session, None, {"x": np.ones(2, np.float32)})[0], np.full(1000, 2))


def test_a_folder_that_is_no_bundle(tmp_path):
    assert "no bundle, it has no model.onnx; make one with 'qexport convert MODEL -o DIR'" in error_of(tmp_path)


def test_a_bundle_runs_with_and_without_the_library(tmp_path, monkeypatch):
    make_bundle(tmp_path / "b", attention={"strategy": "exact"})
    feed = {"input_ids": np.arange(10)[None], "attention_mask": np.ones((1, 10), np.int64)}
    fast = runtime.run(runtime.session(tmp_path / "b"), None, feed)[0]
    slow = runtime.run(runtime.session(tmp_path / "b", library=False), None, feed)[0]
    np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-5)
    (tmp_path / "own.so").symlink_to(installed.get_library_path())
    monkeypatch.chdir(tmp_path)
    for library in (installed.get_library_path(), "own.so"):
        by_path = runtime.run(runtime.session(tmp_path / "b", library=library), None, feed)[0]
        np.testing.assert_array_equal(fast, by_path)


def test_the_library_is_where_it_says():
    path = Path(installed.get_library_path())
    assert path.is_file()
    assert path.name == installed.library_file_name()


def test_a_missing_library_says_what_to_do(monkeypatch):
    monkeypatch.setattr(installed, "find_library", lambda: None)
    with pytest.raises(QexportError, match=r"pip install \.") as error:
        installed.get_library_path()
    assert "library=False" in str(error.value)


def test_a_file_that_is_no_library(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "fake.so").write_text("no library")
    for name, words in (("fake.so", "cannot load the op library "), ("missing.so", ""), ("b", "")):
        with pytest.raises(QexportError) as error:
            runtime.session(tmp_path / "b", library=tmp_path / name)
        text = str(error.value)
        assert text.startswith(f"{words}{tmp_path / name}: ")
        assert text.endswith(f"; give a {installed.library_file_name()} that was built for this machine")
        assert "\n" not in text
        assert text.count(str(tmp_path)) == 1


def test_more_threads_than_the_machine_bears(monkeypatch):
    for processors, most in ((None, 64), (2, 64), (48, 192)):
        monkeypatch.setattr(runtime.os, "cpu_count", lambda count=processors: count)
        assert runtime.quiet_options(most).intra_op_num_threads == most
        with pytest.raises(UsageError, match=f"^threads must be at most {most} on a machine with .*, got {most + 1}; lower"):
            runtime.quiet_options(most + 1)
    assert runtime.quiet_options().intra_op_num_threads == 0


def test_a_provider_that_is_not_there(tmp_path):
    make_bundle(tmp_path / "b")
    with pytest.raises(UsageError, match=r"available: .*CPUExecutionProvider"):
        runtime.session(tmp_path / "b", providers=["AbacusExecutionProvider"])


def test_a_provider_that_does_not_start(tmp_path):
    if "CUDAExecutionProvider" not in installed.onnxruntime().get_available_providers() or _has_gpu():
        pytest.skip("needs an onnxruntime built for CUDA on a machine without a GPU")
    make_bundle(tmp_path / "b")
    with pytest.raises(QexportError, match=r"CUDAExecutionProvider.* did not start"):
        runtime.session(tmp_path / "b", providers=["CUDAExecutionProvider"])


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        (
            {"input_ids": np.full((1, 3), 99), "attention_mask": np.ones((1, 3), np.int64)},
            "node 'node_embedded' (Gather) failed",
        ),
        ({"input_ids": np.zeros((1, 3), np.int64)}, "attention_mask"),
        ({"input_ids": np.zeros((1, 3)), "attention_mask": np.ones((1, 3), np.int64)}, "expected: (tensor(int64))"),
    ],
)
def test_a_failing_run(tmp_path, feed, message):
    make_bundle(tmp_path / "b")
    with pytest.raises(QexportError) as error:
        runtime.run(runtime.session(tmp_path / "b", library=False), None, feed)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_runtime_must_be_installed():
    installed.check_runtime({"onnxruntime": "1.20.0"})
    installed.check_runtime({"onnxruntime-gpu": "1.31.1"})
    with pytest.raises(QexportError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        installed.check_runtime({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    with pytest.raises(QexportError, match=r"onnxruntime 1\.9\.0 is too old, qexport needs 1\.20"):
        installed.check_runtime({"onnxruntime": "1.9.0"})


def test_both_packages_are_seen_in_the_metadata(tmp_path):
    for name in ("onnxruntime", "onnxruntime-gpu"):
        info = tmp_path / f"{name.replace('-', '_')}-1.30.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.30.0\n")
    done = _python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from qexport.installed import onnxruntime; onnxruntime()"
    )
    assert done.stderr.splitlines()[-1].startswith(
        "qexport.errors.QexportError: onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0"
    )


def test_no_runtime_is_one_line():
    done = _python("import sys; sys.modules['onnxruntime'] = None; from qexport.installed import onnxruntime; onnxruntime()")
    last = done.stderr.splitlines()[-1]
    assert last == "qexport.errors.QexportError: onnxruntime is not installed: pip install onnxruntime (or onnxruntime-gpu)"


def test_an_emptied_runtime_is_one_line(tmp_path):
    (tmp_path / "onnxruntime").mkdir()  # what is left when one of two packages is uninstalled
    done = _python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from qexport.installed import onnxruntime; onnxruntime()"
    )
    if done.returncode == 0:  # a later folder on the path holds a whole one, and namespace packages yield to it
        (tmp_path / "onnxruntime" / "__init__.py").write_text("")
        done = _python(
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from qexport.installed import onnxruntime; onnxruntime()"
        )
    assert "installed but broken" in done.stderr.splitlines()[-1]


def _python(code: str):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_the_seed_is_optional_and_counts(tmp_path):
    """Leaving the seed out equals feeding its default, another one gives another output."""
    make_bundle(tmp_path / "b")
    session = runtime.session(tmp_path / "b")
    feed = {"input_ids": np.arange(20)[None], "attention_mask": np.ones((1, 20), np.int64)}
    default = runtime.run(session, None, feed)[0]
    same = runtime.run(session, None, {**feed, "seed": np.array(0)})[0]
    other = runtime.run(session, None, {**feed, "seed": np.array(1)})[0]
    np.testing.assert_array_equal(default, same)
    assert np.abs(default - other).max() > 1e-3
