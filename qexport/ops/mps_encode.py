"""The op MPSEncode: its table entry and its shape inference. Standard ONNX has no singular value decomposition, nor anything
that finds the left vectors of a cut in a fixed number of its operators: there is no fallback."""

from qexport.errors import UsageError
from qexport.mps.layout import Layout
from qexport.ops.spec import Attr, OpSpec, Param

ROW_FACTORS = Attr("row_factors", "ints", "Size of the row index at each site, product >= rows.", (1,), minimum=1)
COL_FACTORS = Attr("col_factors", "ints", "Size of the column index at each site, product >= columns.", (1,), minimum=1)
TYPES = ("tensor(float)", "tensor(double)")


def _check(values: dict) -> None:
    if not values["tol"] < 1:
        raise UsageError(f"[MPSEncode] tol must be in [0, 1), got {values['tol']:g}")
    _layout(values["row_factors"], values["col_factors"])


SPEC = OpSpec(
    name="MPSEncode",
    stem="mps_encode",
    summary="The matrix product operator of a matrix by TT-SVD, with its exact truncation error.",
    inputs=(
        Param("matrix", "T", "(..., rows, columns), up to 4 axes", "Padded with zeros to the products of the factors."),
    ),
    outputs=(
        Param(
            "cores",
            "T",
            "(..., numbers)",
            "The cores behind each other, core k of shape (bond k, row_factors[k], col_factors[k], bond k + 1); bonds are "
            "min(bond_dim, product of the factors to the left, to the right), unused ones hold zeros.",
        ),
        Param("ranks", "I", "(..., sites + 1)", "The bond dimensions that are used."),
        Param("error", "E", "(...)", "Relative error in the Frobenius norm; that of the padded matrix."),
        Param("lower_bound", "E", "(...)", "What no train of these ranks can be better than, likewise."),
    ),
    attributes=(
        ROW_FACTORS,
        COL_FACTORS,
        Attr("bond_dim", "int", "Largest bond dimension.", 32, minimum=1, maximum=1 << 20),
        Attr(
            "tol",
            "float",
            "Relative error that is allowed, below 1; 0: as small as bond_dim allows.",
            0.0,
            minimum=0,
        ),
    ),
    type_vars={"T": TYPES, "I": ("tensor(int64)",), "E": ("tensor(double)",)},
    check=_check,
)


def _layout(row_factors, col_factors) -> Layout:
    try:
        return Layout(1, 1, tuple(row_factors), tuple(col_factors))
    except UsageError as error:
        raise UsageError(f"[MPSEncode] {error}") from None


def infer_shapes(ctx) -> None:
    """Type and shape inference for onnx (an `onnx.shape_inference.InferenceContext`)."""
    from onnx import TensorProto, helper

    matrix = ctx.get_input_type(0).tensor_type
    row_factors, col_factors = (list(ctx.get_attribute(name).ints) for name in ("row_factors", "col_factors"))
    layout = _layout(row_factors, col_factors)
    numbers = layout.numbers(layout.bonds(ctx.get_attribute("bond_dim").i))
    dims = list(matrix.shape.dim)[:-2] if matrix.HasField("shape") else None
    more = ([numbers], [len(row_factors) + 1], [], [])
    types = (matrix.elem_type, TensorProto.INT64, TensorProto.DOUBLE, TensorProto.DOUBLE)
    for i, (elem_type, last) in enumerate(zip(types, more, strict=True)):
        give_dims(ctx, i, helper.make_tensor_type_proto(elem_type, None if dims is None else last), dims)


def give_dims(ctx, output: int, result, leading) -> None:
    """Tell onnx's shape inference the type of an output: the `leading` dims of an input, then those of `result`."""
    if leading:
        last = list(result.tensor_type.shape.dim)
        del result.tensor_type.shape.dim[:]
        result.tensor_type.shape.dim.extend([*leading, *last])
    ctx.set_output_type(output, result)
