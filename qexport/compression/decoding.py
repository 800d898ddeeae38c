"""Functions of standard ONNX ops that make matrices of what is stored; a runtime computes them once, when it loads the file.

Of a `Trellis`, eight symbols of `bits` bits fill `bits` bytes. A convolution over the bytes, with the byte as its step and
a number of channels, reads from three bytes the window that ends with each pair of symbols: sums of bytes times powers of
two, exact in float32. The window then picks the values of both from a table of pairs.
"""

import onnx
import onnx_ir as ir
from onnx import parser

from qexport.compression.trellis import GROUP, WINDOW

DOMAIN = "com.qexport.storage"
VERSION = 1
PAIRS = GROUP // 2
# Largest code of a weight in a product of whole numbers. Processors without VNNI add two products with inputs of 8 bits in
# 16 bits with a sign, which 2 x 255 x 64 fit and 2 x 255 x 127 do not.
TOP = 64
# Of a column that is zero; a normal number of float32.
LEAST_STEP = 1e-37


def pairs_function(bits: int, opset: int) -> ir.Function:
    """Pairs{bits}(table) -> float16 (2^(WINDOW + bits), 2): the values of a symbol and the next, by the bits up to the
    latter."""
    return _function(
        f"""<domain: "{DOMAIN}", opset_import: ["": {opset}]>
        Pairs{bits} (table) => (pairs) {{
            none = Constant <value = int32 {{0}}> ()
            count = Constant <value = int32 {{{2 ** (WINDOW + bits)}}}> ()
            one = Constant <value = int32 {{1}}> ()
            window = Range (none, count, one)
            above = Constant <value = int32 {{{2**bits}}}> ()
            entries = Constant <value = int32 {{{2**WINDOW}}}> ()
            first = Div (window, above)
            second = Mod (window, entries)
            axis = Constant <value = int64[1] {{1}}> ()
            first_column = Unsqueeze (first, axis)
            second_column = Unsqueeze (second, axis)
            both = Concat <axis = 1> (first_column, second_column)
            pairs = Gather (table, both)
        }}"""
    )


def rows_function(bits: int, opset: int) -> ir.Function:
    """Rows{bits}(strings uint8 (rows, 1, bytes), pairs) -> float16 (rows, symbols), without the scales.

    In float16, as onnxruntime frees what it made on the way to a constant only behind the last constant."""
    kernel = []
    for pair in range(1, PAIRS + 1):
        last = -(-2 * pair * bits // 8)  # bytes up to the end of the pair; two come before the first
        beyond = 8 * last - 2 * pair * bits
        kernel += [2.0 ** (8 * (last + 1 - i) - beyond) if last - 1 <= i <= last + 1 else 0.0 for i in range(bits + 2)]
    numbers = ", ".join(map(repr, kernel))
    return _function(
        f"""<domain: "{DOMAIN}", opset_import: ["": {opset}]>
        Rows{bits} (strings, pairs) => (matrix) {{
            bytes = Cast <to = {onnx.TensorProto.FLOAT}> (strings)
            kernel = Constant <value = float[{PAIRS}, 1, {bits + 2}] {{{numbers}}}> ()
            long_windows = Conv <strides = [{bits}], pads = [2, 0]> (bytes, kernel)
            whole = Cast <to = {onnx.TensorProto.INT32}> (long_windows)
            count = Constant <value = int32 {{{2 ** (WINDOW + bits)}}}> ()
            windows = Mod (whole, count)
            values = Gather (pairs, windows)
            shape = Constant <value = int64[2] {{0, -1}}> ()
            matrix = Reshape (values, shape)
        }}"""
    )


def blocks_function(bits: int, opset: int) -> ir.Function:
    """Blocks{bits}(codes uint8 (columns, blocks, bytes), scales (columns, blocks)) -> float (columns, rows): the transpose
    of a `Quantized` matrix, with the rows that fill up its last block."""
    halves = """
            above = Constant <value = float {16}> ()
            quotient = Div (bytes, above)
            high = Floor (quotient)
            high_bits = Mul (high, above)
            low = Sub (bytes, high_bits)
            last = Constant <value = int64[1] {-1}> ()
            low_column = Unsqueeze (low, last)
            high_column = Unsqueeze (high, last)
            both = Concat <axis = -1> (low_column, high_column)
            by_block = Constant <value = int64[3] {0, 0, -1}> ()
            whole = Reshape (both, by_block)"""
    return _function(
        f"""<domain: "{DOMAIN}", opset_import: ["": {opset}]>
        Blocks{bits} (codes, scales) => (matrix) {{
            bytes = Cast <to = {onnx.TensorProto.FLOAT}> (codes){halves if bits == 4 else ""}
            zero = Constant <value = float {{{2 ** (bits - 1)}}}> ()
            steps = Sub ({"whole" if bits == 4 else "bytes"}, zero)
            axis = Constant <value = int64[1] {{2}}> ()
            each = Unsqueeze (scales, axis)
            values = Mul (steps, each)
            shape = Constant <value = int64[2] {{0, -1}}> ()
            matrix = Reshape (values, shape)
        }}"""
    )


def columns_function(opset: int) -> ir.Function:
    """Columns(matrix (rows, columns)) -> (codes int8 (rows, columns), scales (columns,)): the matrix in whole numbers up to
    TOP, with a scale for each column."""
    axes = ("<keepdims = 0> (size, first)", "<keepdims = 0, axes = [0]> (size)")[opset < 18]
    return _function(
        f"""<domain: "{DOMAIN}", opset_import: ["": {opset}]>
        Columns (matrix) => (codes, scales) {{
            size = Abs (matrix)
            first = Constant <value = int64[1] {{0}}> ()
            largest = ReduceMax {axes}
            top = Constant <value = float {{{TOP}}}> ()
            steps = Div (largest, top)
            least = Constant <value = float {{{LEAST_STEP}}}> ()
            scales = Max (steps, least)
            scaled = Div (matrix, scales)
            whole = Round (scaled)
            codes = Cast <to = {onnx.TensorProto.INT8}> (whole)
        }}"""
    )


def _function(text: str) -> ir.Function:
    return ir.serde.deserialize_function(parser.parse_function(text))
