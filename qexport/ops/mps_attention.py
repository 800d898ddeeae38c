"""The op MPSAttention: its table entry, its fallback, its shape inference."""

from functools import partial

from qexport.ops.mps_decode import TRAIN_ATTRIBUTES, check_train, matrix_nodes
from qexport.ops.mps_encode import give_dims
from qexport.ops.quantum_noise import FLOATS
from qexport.ops.spec import Attr, OpSpec, Param

METHOD = Attr(
    "method",
    "string",
    "factored: through the cores, neighbours merged where that is faster; dense: through the matrix; auto: whichever is "
    "estimated to take less time.",
    "auto",
    choices=("auto", "factored", "dense"),
)

SPEC = OpSpec(
    name="MPSAttention",
    stem="mps_attention",
    summary="Attention, or any other matrix, that is a matrix product operator, times values.",
    inputs=(
        Param("cores", "T", "(numbers,) or (..., numbers)", "As in MPSDecode; one axis: the same matrix for all values."),
        Param("V", "T", "(..., cols, features), 2 to 4 axes", "With the leading axes of the cores, if they have any."),
    ),
    outputs=(Param("Y", "T", "(..., rows, features)", "The products; float16 and bfloat16 are summed in float."),),
    attributes=(*TRAIN_ATTRIBUTES, METHOD),
    type_vars={"T": FLOATS},
    fallback="the matrix by a Loop of MatMul over the sites, then MatMul",
    check=partial(check_train, "MPSAttention"),
)


def fallback_nodes(opset: int, num_outputs: int):
    """Standard nodes over the names of SPEC."""
    from onnx import helper

    return [*matrix_nodes("MPSAttention", opset), helper.make_node("MatMul", ["matrix", "V"], ["Y"])]


def infer_shapes(ctx) -> None:
    """Type and shape inference for onnx (an `onnx.shape_inference.InferenceContext`)."""
    from onnx import helper

    V = ctx.get_input_type(1).tensor_type
    dims = list(V.shape.dim) if V.HasField("shape") else None
    result = helper.make_tensor_type_proto(V.elem_type, None if dims is None else [ctx.get_attribute("rows").i])
    if dims is not None:
        result.tensor_type.shape.dim.append(dims[-1])
    give_dims(ctx, 0, result, dims and dims[:-2])
