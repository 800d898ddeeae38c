"""The op MPSDecode: its table entry, its fallback, its shape inference."""

from functools import partial

from qexport.errors import UsageError
from qexport.mps.layout import Layout
from qexport.mps.layout import check_bonds as check_layout_bonds
from qexport.ops.mps_encode import COL_FACTORS, ROW_FACTORS, TYPES, give_dims
from qexport.ops.spec import Attr, OpSpec, Param

TRAIN_ATTRIBUTES = (
    Attr("rows", "int", "Rows of the matrix.", 1, minimum=1),
    Attr("cols", "int", "Columns of the matrix.", 1, minimum=1),
    ROW_FACTORS,
    COL_FACTORS,
    Attr(
        "bonds",
        "ints",
        "Bond dimensions of the cores, sites + 1 with a 1 at each end.",
        (1, 1),
        minimum=1,
        maximum=1 << 20,
    ),
)


def check_train(op_name: str, values: dict) -> None:
    """Raise UsageError where TRAIN_ATTRIBUTES do not fit each other."""
    try:
        layout = train_layout(values)
        check_layout_bonds(layout, tuple(values["bonds"]))
    except UsageError as error:
        raise UsageError(f"[{op_name}] {error}") from None


def train_layout(values: dict) -> Layout:
    """The sites that TRAIN_ATTRIBUTES tell."""
    return Layout(values["rows"], values["cols"], tuple(values["row_factors"]), tuple(values["col_factors"]))


SPEC = OpSpec(
    name="MPSDecode",
    stem="mps_decode",
    summary="The matrix of a matrix product operator.",
    inputs=(Param("cores", "T", "(..., numbers), up to 3 axes", "The cores behind each other, as MPSEncode makes them."),),
    outputs=(Param("matrix", "T", "(..., rows, cols)", "Their product, without the padding."),),
    attributes=TRAIN_ATTRIBUTES,
    type_vars={"T": TYPES},
    fallback="a Loop of MatMul over the sites",
    check=partial(check_train, "MPSDecode"),
)


def fallback_nodes(opset: int, num_outputs: int):
    """Standard nodes over the names of SPEC."""
    return matrix_nodes("MPSDecode", opset)


def matrix_nodes(op_name: str, opset: int):
    """Standard nodes that make `matrix` of `cores` in a function with TRAIN_ATTRIBUTES: one pass of a Loop multiplies
    (batch, R C, bond) with the core of a site.

    Raises:
        UsageError: opset below 17.
    """
    from onnx import TensorProto, ValueInfoProto, helper

    if opset < 17:
        raise UsageError(f"[{op_name}] the fallback needs opset 17 or newer, got {opset}")
    make = helper.make_node

    def given(name, kind, output):
        node = make("Constant", [], [output])
        node.attribute.add(name=kind, ref_attr_name=name, type=helper.make_attribute(kind, [1]).type)
        return node

    def numbers(output, *values):
        return make("Constant", [], [output], value_ints=list(values))

    def typed(name):  # Loop tells the type of the numbers
        return ValueInfoProto(name=name)

    carried = ("R", "C", "offset", "state")
    body = [
        make("Reshape", ["k", "one"], ["site"]),
        make("Add", ["site", "one"], ["next_site"]),
        make("Gather", ["row_sizes", "site"], ["r"]),
        make("Gather", ["col_sizes", "site"], ["c"]),
        make("Gather", ["bond_sizes", "site"], ["left"]),
        make("Gather", ["bond_sizes", "next_site"], ["right"]),
        make("Mul", ["r", "c"], ["r_c"]),
        make("Mul", ["r_c", "right"], ["behind"]),
        make("Mul", ["left", "behind"], ["size"]),
        make("Add", ["offset", "size"], ["offset_next"]),
        make("Slice", ["flat", "offset", "offset_next", "one"], ["core_flat"]),
        make("Concat", ["count", "left", "behind"], ["core_shape"], axis=0),
        make("Reshape", ["core_flat", "core_shape"], ["core"]),
        make("MatMul", ["state", "core"], ["product"]),
        make("Concat", ["count", "R", "C", "r", "c", "right"], ["digits"], axis=0),
        make("Reshape", ["product", "digits"], ["by_digits"]),
        make("Transpose", ["by_digits"], ["ordered"], perm=[0, 1, 3, 2, 4, 5]),
        make("Mul", ["R", "r"], ["R_next"]),
        make("Mul", ["C", "c"], ["C_next"]),
        make("Mul", ["R_next", "C_next"], ["places"]),
        make("Concat", ["count", "places", "right"], ["state_shape"], axis=0),
        make("Reshape", ["ordered", "state_shape"], ["state_next"]),
        make("Identity", ["go"], ["go_on"]),
    ]
    inputs = [
        helper.make_tensor_value_info("k", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        *(typed(name) for name in carried),
    ]
    graph = helper.make_graph(body, "site", inputs, [typed("go_on"), *(typed(f"{name}_next") for name in carried)])
    return [
        given("row_factors", "value_ints", "row_sizes"),
        given("col_factors", "value_ints", "col_sizes"),
        given("bonds", "value_ints", "bond_sizes"),
        given("rows", "value_int", "rows_scalar"),
        given("cols", "value_int", "cols_scalar"),
        numbers("zero", 0),
        numbers("one", 1),
        numbers("both", 1, 2),
        numbers("begin", 0, 0),
        make("Reshape", ["rows_scalar", "one"], ["rows_kept"]),
        make("Reshape", ["cols_scalar", "one"], ["cols_kept"]),
        make("Shape", ["cores"], ["batch"], end=-1),
        make("Shape", ["cores"], ["numbers"], start=-1),
        make("ReduceProd", ["batch"], ["count"], keepdims=1),
        make("Concat", ["count", "numbers"], ["flat_shape"], axis=0),
        make("Reshape", ["cores", "flat_shape"], ["flat"]),
        make("CastLike", ["one", "cores"], ["unit"]),
        make("Concat", ["count", "one", "one"], ["unit_shape"], axis=0),
        make("Expand", ["unit", "unit_shape"], ["start"]),
        make("Size", ["row_sizes"], ["sites"]),
        make("Loop", ["sites", "", "one", "one", "zero", "start"], ["padded_R", "padded_C", "used", "done"], body=graph),
        make("Concat", ["count", "padded_R", "padded_C"], ["padded_shape"], axis=0),
        make("Reshape", ["done", "padded_shape"], ["padded"]),
        make("Concat", ["rows_kept", "cols_kept"], ["kept"], axis=0),
        make("Slice", ["padded", "begin", "kept", "both"], ["cropped"]),
        make("Concat", ["batch", "rows_kept", "cols_kept"], ["matrix_shape"], axis=0),
        make("Reshape", ["cropped", "matrix_shape"], ["matrix"]),
    ]


def infer_shapes(ctx) -> None:
    """Type and shape inference for onnx (an `onnx.shape_inference.InferenceContext`)."""
    from onnx import helper

    cores = ctx.get_input_type(0).tensor_type
    dims = list(cores.shape.dim)[:-1] if cores.HasField("shape") else None
    sizes = [ctx.get_attribute(name).i for name in ("rows", "cols")]
    give_dims(ctx, 0, helper.make_tensor_type_proto(cores.elem_type, None if dims is None else sizes), dims)
