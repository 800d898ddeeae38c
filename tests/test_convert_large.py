"""A model above 2 GB, which one protobuf cannot hold. Its weights are a sparse file, so that the source takes no room."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qexport.bundle import Bundle
from qexport.conversion import convert
from qexport.runtime import session

ROWS, COLUMNS, FILLED = 16_400, 32_768, 64  # 2.15e9 bytes of float32, of which 64 rows are not zero
TEXT = """
<ir_version: 8, opset_import: ["": 17]> g (int64[batch,sequence] input_ids) => (float[batch,4,sequence,8] y)
<int64[1] start = {0}, int64[1] end = {32}, int64[1] axis = {2}, int64[4] heads = {0, 0, 4, 8}> {
  x = Gather(table, input_ids) h = Slice(x, start, end, axis) r = Reshape(h, heads) q = Transpose<perm=[0,2,1,3]>(r)
  kt = Transpose<perm=[0,2,3,1]>(r) s = MatMul(q, kt) p = Softmax<axis=-1>(s) y = MatMul(p, q)
}"""


@pytest.fixture
def source(tmp_path):
    if shutil.disk_usage(tmp_path).free < 6 << 30:
        pytest.skip("needs 6 GB of free disk")
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "weights.bin", "wb") as file:
        file.truncate(ROWS * COLUMNS * 4)
        for row in range(FILLED):
            file.seek(row * COLUMNS * 4)
            file.write(rng.standard_normal(32).astype(np.float32).tobytes())
    model = onnx.parser.parse_model(TEXT)
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[ROWS, COLUMNS], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(ROWS * COLUMNS * 4))):
        table.external_data.add(key=key, value=value)
    model.graph.initializer.append(table)
    (folder / "large.onnx").write_bytes(model.SerializeToString())
    yield folder / "large.onnx"
    shutil.rmtree(tmp_path)


def test_a_model_above_2_gb(source):
    target = source.parent.parent / "bundle"
    report = convert(source, target, strategy="stratified", num_samples=64)
    assert len(report.sites) == 1
    sizes = {name: entry["bytes"] for name, entry in Bundle.open(target).manifest["files"].items()}
    assert sizes["model.onnx.data"] >= ROWS * COLUMNS * 4 > 2**31
    assert sizes["model.onnx"] < 1e5
    assert sizes["classical.onnx"] < 1e5
    feeds = {"input_ids": np.arange(FILLED).reshape(2, -1)}
    expected = session(source, library=False).run(None, feeds)[0]
    for library in (False, True):
        np.testing.assert_allclose(session(target, library=library).run(["y"], feeds)[0], expected, rtol=0, atol=2e-5)
