"""The op MPOLinear: its table entry, its fallback, its shape inference."""

from functools import partial

from qexport.ops.mps_attention import METHOD
from qexport.ops.mps_decode import TRAIN_ATTRIBUTES, check_train, matrix_nodes
from qexport.ops.mps_encode import give_dims
from qexport.ops.quantum_noise import FLOATS
from qexport.ops.spec import OpSpec, Param

SPEC = OpSpec(
    name="MPOLinear",
    stem="mpo_linear",
    summary="A linear layer whose weight, (inputs, outputs) as in MatMul, is a matrix product operator.",
    inputs=(
        Param("x", "T", "(..., rows), 1 to 4 axes", "Rows are inputs of the layer."),
        Param(
            "cores",
            "T",
            "(numbers,)",
            "As in MPSDecode. What is made of an initializer is kept from run to run, the matrix too if that is faster.",
        ),
        Param("bias", "T", "(cols,)", "Added to each row.", optional=True),
    ),
    outputs=(Param("y", "T", "(..., cols)", "x W + bias; float16 and bfloat16 are summed in float."),),
    attributes=(*TRAIN_ATTRIBUTES, METHOD),
    type_vars={"T": FLOATS},
    fallback="the matrix by a Loop of MatMul over the sites, then Gemm",
    check=partial(check_train, "MPOLinear"),
)


def fallback_nodes(opset: int, num_outputs: int):
    """Standard nodes over the names of SPEC. Gemm, unlike Add, may go without its bias."""
    from onnx import helper

    return [
        *matrix_nodes("MPOLinear", opset),
        helper.make_node("Flatten", ["x"], ["x_rows"], axis=-1),
        helper.make_node("Gemm", ["x_rows", "matrix", "bias"], ["y_rows"]),
        helper.make_node("Shape", ["x"], ["x_batch"], end=-1),
        helper.make_node("Concat", ["x_batch", "cols_kept"], ["y_shape"], axis=0),
        helper.make_node("Reshape", ["y_rows", "y_shape"], ["y"], allowzero=1),
    ]


def infer_shapes(ctx) -> None:
    """Type and shape inference for onnx (an `onnx.shape_inference.InferenceContext`)."""
    from onnx import helper

    x = ctx.get_input_type(0).tensor_type
    dims = list(x.shape.dim)[:-1] if x.HasField("shape") else None
    last = None if dims is None else [ctx.get_attribute("cols").i]
    give_dims(ctx, 0, helper.make_tensor_type_proto(x.elem_type, last), dims)
