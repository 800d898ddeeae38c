"""onnx's own conformance cases of ai.onnx Attention, run as QuantumAttention with strategy exact in onnxruntime."""

import numpy as np
import onnx
import pytest
from cpu_sessions import cpu_session
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case import node as node_cases
from onnx.backend.test.case.node import attention  # noqa: F401  (makes its cases)

from qexport.ops import DOMAIN, VERSION
from qexport.ops.proto import make_node

# collect_testcases would make the cases of all ops, which takes six seconds.
CASES = [c for c in node_cases._NodeTestCases if c.name.startswith("test_attention") and len(c.model.graph.node) == 1]


def test_all_cases_were_collected():
    assert len(CASES) == 93, "onnx changed its set of Attention cases: look at the new ones"


def as_quantum_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """The one-node Attention model as QuantumAttention; bfloat16 goes in and out as float32, which numpy knows."""
    node = model.graph.node[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    before, after, rename = [], [], {}
    for values, nodes, to_inside in ((model.graph.input, before, True), (model.graph.output, after, False)):
        for value in values:
            if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                inner, outer = f"{value.name}_bf16", value.name
                ends = (outer, inner, TensorProto.BFLOAT16) if to_inside else (inner, outer, TensorProto.FLOAT)
                nodes.append(helper.make_node("Cast", [ends[0]], [ends[1]], to=ends[2]))
                rename[outer] = inner
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    names = [[rename.get(n, n) for n in ends] for ends in (node.input, node.output)]
    quantum = make_node("QuantumAttention", *names, strategy="exact", **attributes)
    graph = helper.make_graph([*before, quantum, *after], "case", model.graph.input, model.graph.output)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def to_numpy(value):
    array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_case(case):
    model = onnx.ModelProto.FromString(case.model.SerializeToString())
    bf16 = any(i.type.tensor_type.elem_type == TensorProto.BFLOAT16 for i in model.graph.input)
    session = cpu_session(as_quantum_attention(model))
    for inputs, outputs in case.data_sets:
        feeds = {value.name: to_numpy(array) for value, array in zip(model.graph.input, inputs, strict=True)}
        got = session.run(None, feeds)
        for value, want in zip(got, outputs, strict=True):
            # the tolerances of onnx's own runner; bfloat16 has 8 bits, so one unit in the last place is 2^-8
            np.testing.assert_allclose(value, to_numpy(want), rtol=2**-7 if bf16 else 1e-3, atol=2**-7 if bf16 else 1e-3)
