"""The op QuantumOverlap: its table entry, its fallback, its shape inference."""

from dataclasses import replace

from qexport.errors import UsageError
from qexport.ops.quantum_noise import CHANNEL_ATTRIBUTES, CHANNEL_INPUTS, FLOATS, check_channel
from qexport.ops.spec import OpSpec, Param

CHANNEL, *OTHERS = CHANNEL_ATTRIBUTES

SPEC = OpSpec(
    name="QuantumOverlap",
    stem="quantum_overlap",
    summary="The probability of finding each key's state in each query's state after a noise channel, as a SWAP test does.",
    inputs=(
        Param(
            "queries",
            "T",
            "(..., m, d), d >= 2, 2 to 4 axes",
            "Rows that are divided by their norm, and are then the amplitudes of a state of ceil(log2 d) qubits; a row of "
            "zeros is no state and has overlaps of 0.",
        ),
        Param("keys", "T", "(..., k, d)", "As queries, with the same leading axes."),
        *CHANNEL_INPUTS,
    ),
    outputs=(Param("overlaps", "T", "(..., m, k)", "<k| E(|q><q|) |k>, from 0 to 1."),),
    # readout acts on outcomes, which an overlap does not have.
    attributes=(replace(CHANNEL, choices=tuple(c for c in CHANNEL.choices if c != "readout")), *OTHERS),
    type_vars={"T": FLOATS, "P": ("tensor(float)", "tensor(double)")},
    fallback="the overlap without noise, (q.k)^2 / (|q|^2 |k|^2)",
    check=lambda values: check_channel("QuantumOverlap", values),
)


def fallback_nodes(opset: int, num_outputs: int):
    """Standard nodes over the names of SPEC: the overlap without noise, in double."""
    from onnx import TensorProto, helper

    if opset < 17:
        raise UsageError(f"[QuantumOverlap] the fallback needs opset 17 or newer, got {opset}")

    def constant(name, element, dims, values):
        return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, element, dims, values))

    return [
        helper.make_node("Cast", ["queries"], ["q"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["keys"], ["k"], to=TensorProto.DOUBLE),
        constant("last", TensorProto.INT64, [1], [-1]),
        constant("last_but_one", TensorProto.INT64, [1], [-2]),
        constant("zero", TensorProto.DOUBLE, [], [0.0]),
        constant("one", TensorProto.DOUBLE, [], [1.0]),
        helper.make_node("Einsum", ["q", "k"], ["products"], equation="...md,...kd->...mk"),
        helper.make_node("Mul", ["products", "products"], ["squares"]),
        helper.make_node("Mul", ["q", "q"], ["q_squares"]),
        helper.make_node("Mul", ["k", "k"], ["k_squares"]),
        helper.make_node("ReduceSum", ["q_squares", "last"], ["q_norms"]),
        helper.make_node("ReduceSum", ["k_squares", "last"], ["k_sums"], keepdims=0),
        helper.make_node("Unsqueeze", ["k_sums", "last_but_one"], ["k_norms"]),
        helper.make_node("Mul", ["q_norms", "k_norms"], ["norms"]),
        helper.make_node("Equal", ["norms", "zero"], ["no_state"]),
        helper.make_node("Where", ["no_state", "one", "norms"], ["divisors"]),
        helper.make_node("Div", ["squares", "divisors"], ["quotients"]),
        helper.make_node("CastLike", ["quotients", "queries"], ["overlaps"]),
    ]


def infer_shapes(ctx) -> None:
    """Type and shape inference for onnx (an `onnx.shape_inference.InferenceContext`)."""
    from onnx import TypeProto

    queries, keys = (ctx.get_input_type(i).tensor_type for i in (0, 1))
    result = TypeProto()
    result.tensor_type.elem_type = queries.elem_type
    if queries.HasField("shape") and keys.HasField("shape") and len(keys.shape.dim) > 1:
        result.tensor_type.shape.dim.extend([*list(queries.shape.dim)[:-1], keys.shape.dim[-2]])
    ctx.set_output_type(0, result)
