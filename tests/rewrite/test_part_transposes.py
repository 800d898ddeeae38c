"""part_transposes: onnxruntime runs a Transpose before float16 weights, which it fused and crashed on."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qexport.rewrite.part_transposes import part_transposes

RUN = """
import sys
import numpy as np
import onnxruntime
path, dtype = sys.argv[1:]
x = np.arange(30).reshape(2, 3, 5).astype(dtype)
y = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
np.testing.assert_array_equal(y, x.transpose(1, 0, 2) @ np.ones((5, 4), dtype))
"""


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_transposes_before_weights(tmp_path, dtype):
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    written = dtype.replace("float32", "float")
    text = f"""<ir_version: 10, opset_import: ["": 23]>
        g ({written}[b, n, 5] x) => ({written}[n, b, 4] y) {{ t = Transpose<perm = [1, 0, 2]>(x)  y = MatMul(t, w) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("t", element, ["n", "b", 5]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((5, 4), dtype), "w"))
    model = ir.serde.deserialize_model(proto)
    part_transposes(model)
    between = [] if dtype == "float32" else ["Constant", "Reshape"]
    assert [node.op_type for node in model.graph] == ["Transpose", *between, "MatMul"]
    ir.save(model, tmp_path / "m.onnx")
    # in a process of its own, which a crash ends
    ran = subprocess.run([sys.executable, "-c", RUN, tmp_path / "m.onnx", dtype], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
