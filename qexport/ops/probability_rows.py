"""What the ops on rows of probabilities share: the check of their rows, and shapes like those of the rows.

torch and onnx are imported where they are used: the op table needs neither."""

from qexport.errors import UsageError

# How far the sum of a row may be from one: what rounding to the type and summing long rows may leave.
SUM_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
MAX_AXES = 4


def check_rows(op_name: str, probabilities, least: int) -> None:
    """Raise where a tensor (..., n) does not hold rows of probabilities; a row of zeros may be one.

    Args:
        op_name: the message begins with it.
        probabilities: torch tensor.
        least: the smallest n that the op takes.

    Raises:
        UsageError: not 1 to 4 axes, n too small, not floating point, a number below 0 or NaN, a sum that is not one.
    """
    where = f"[{op_name}] probabilities"
    dtype = str(probabilities.dtype).removeprefix("torch.")
    if dtype not in SUM_TOLERANCE:
        raise UsageError(f"{where} must be float32, float16, bfloat16 or float64, got {dtype}")
    if not 1 <= probabilities.ndim <= MAX_AXES:
        raise UsageError(f"{where} must have 1 to {MAX_AXES} dimensions, got {probabilities.ndim}")
    n, tolerance = probabilities.shape[-1], SUM_TOLERANCE[dtype]
    if n < least:
        raise UsageError(f"{where} must have rows of >= {least} numbers, got rows of {n}")
    rows = probabilities.reshape(-1, n).double()
    sums = rows.sum(-1)
    good = (rows >= 0).all(-1) & (((sums - 1).abs() <= tolerance) | (sums == 0))
    if good.all():
        return
    row = int((~good).nonzero()[0])
    for j, value in enumerate(rows[row].tolist()):
        if not value >= 0:
            raise UsageError(f"{where} must be >= 0, got {value:g} at place {j} of row {row}")
    raise UsageError(
        f"{where} must sum to 1 within {tolerance:g}, row {row} is off by {float(sums[row]) - 1:g}; divide it by its sum"
    )


def give_like(ctx, output: int, type_of: int, without_last: bool = False) -> None:
    """Tell onnx's shape inference that an output has the shape of input 0, and the element type of input `type_of`."""
    from onnx import TypeProto

    if not ctx.has_output(output):
        return
    rows = ctx.get_input_type(0).tensor_type
    result = TypeProto()
    result.tensor_type.elem_type = ctx.get_input_type(type_of).tensor_type.elem_type
    if rows.HasField("shape"):
        result.tensor_type.shape.SetInParent()
        result.tensor_type.shape.dim.extend(list(rows.shape.dim)[: -1 if without_last else None])
    ctx.set_output_type(output, result)
