"""Compressed weights as nodes that a stock onnxruntime runs: MatMulNBits and GatherBlockQuantized of its own domain, and
MPOLinear of ours, which has a fallback."""

import numpy as np
import onnx_ir as ir

from qexport.compression import decoding
from qexport.compression.forms import Form, Half
from qexport.compression.layers import Layer, is_way
from qexport.compression.lowrank import LowRank
from qexport.compression.quantize import Quantized
from qexport.compression.trains import Train
from qexport.compression.trellis import Trellis, table
from qexport.ops import DOMAIN, VERSION
from qexport.rewrite.graph import Builder, is_op
from qexport.rewrite.sample_attention import hand_over

RUNTIME = "com.microsoft"
# MatMulNBits multiplies whole numbers: it rounds each block of its other operand to 8 bits. Level 0 keeps that in float.
ACCURACY_LEVEL = 4
# The first onnxruntime that reads entries of a table in these codes, and the first that multiplies by codes of 8 bits; those
# of 4 bits are older than what the op library loads on. Measured with 1.20 to 1.32.
TABLES_SINCE, INT8_SINCE = (1, 23), (1, 22)


def store(
    model: ir.Model, layer: Layer, form: Form, accuracy_level: int = ACCURACY_LEVEL, *, as_matrix: bool = False
) -> None:
    """Put a form in the place of a layer's weight.

    Args:
        as_matrix: whether products get codes as a matrix that the runtime makes when it loads the file, and stay what they
            are; a Half and a Trellis always are one.
    """
    writer = _Writer(model, layer, accuracy_level)
    if isinstance(form, Half):
        writer.half(form)
    elif isinstance(form, Quantized):
        writer.quantized(form, as_matrix)
    elif isinstance(form, Train):
        writer.train(form)
    elif isinstance(form, Trellis):
        writer.trellis(form)
    else:
        writer.low_rank(form)
    _remove_ways(layer.value)
    if not layer.value.uses():
        del model.graph.initializers[layer.name]


def oldest_runtime(layer: Layer, form: Form, *, as_matrix: bool = False) -> tuple[int, ...]:
    """The first onnxruntime that runs a layer in this form, () where any does; `as_matrix` as for `store`."""
    if isinstance(form, Half | Train | Trellis):
        return ()
    if layer.picks:
        return TABLES_SINCE
    if as_matrix:
        return ()
    parts = (form.left, form.right) if isinstance(form, LowRank) else (form,)
    return INT8_SINCE if any(part.bits == 8 for part in parts) else ()


def add_function(model: ir.Model, function: ir.Function) -> None:
    """Add a function of `decoding` to a model, once."""
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports[decoding.DOMAIN] = decoding.VERSION


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer."""
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _remove_ways(value: ir.Value) -> None:
    """Remove the Transposes of a weight whose products are gone."""
    for node in [use.node for use in value.uses() if is_way(use.node)]:
        _remove_ways(node.outputs[0])
        if not node.outputs[0].uses():
            node.graph.remove(node, safe=True)


class _Writer:
    def __init__(self, model: ir.Model, layer: Layer, accuracy_level: int):
        self.model, self.graph, self.layer, self.level = model, model.graph, layer, accuracy_level
        self.stored: dict[str, ir.Value] = {}
        self.scales: dict[tuple[str, bool], ir.Value] = {}

    def half(self, form: Half) -> None:
        """A Cast, which the runtime computes once, when it loads the file."""
        builder = self._first()
        half = self._keep("half", self.layer.turned(form.matrix).reshape(self.layer.shape))
        self._take_place(builder.node("Cast", half, like=self.layer.value, shape=self.layer.shape, to=self._dtype))

    def trellis(self, form: Trellis) -> None:
        """The matrix made of strings, rows of the same bits together: once, when the runtime loads the file."""
        builder, parts, half = self._first(), [], {"dtype": ir.DataType.FLOAT16}
        for bits, rows in form.groups():
            strings = self._keep(f"strings{bits}", form.packed(bits, rows))
            self._function(decoding.rows_function, bits)
            parts.append(builder.node(f"Rows{bits}", strings, self._pairs(bits), domain=decoding.DOMAIN, **half))
        matrix = parts[0]
        if len(parts) > 1:
            order = builder.node("Cast", self._keep("order", form.order()), to=ir.DataType.INT32)
            matrix = builder.node("Gather", builder.node("Concat", *parts, axis=0, **half), order, **half)
        if form.symbols.shape[1] > form.columns:
            matrix = builder.node("Slice", matrix, [0], [form.columns], [1], **half)
        if len(form.outliers):
            places = builder.node("Cast", self._keep("places", form.positions()), to=ir.DataType.INT64)
            matrix = builder.node("ScatterND", matrix, places, self._keep("outliers", form.outliers), **half)
        full = {"to": ir.DataType.FLOAT, "dtype": ir.DataType.FLOAT}
        scales = builder.node("Cast", self._keep("scales", form.scales[:, None]), **full)
        matrix = builder.node("Mul", builder.node("Cast", matrix, **full), scales, like=scales)
        if self.layer.transposed:
            matrix = builder.node("Transpose", matrix, perm=[1, 0], like=matrix)
        if self._dtype != ir.DataType.FLOAT:
            matrix = builder.node("Cast", matrix, to=self._dtype, like=self.layer.value)
        matrix.shape = self.layer.value.shape
        self._take_place(matrix)

    def quantized(self, form: Quantized, as_matrix: bool) -> None:
        """Codes by column: what a product reads for an output, and a table for an entry."""
        if as_matrix:
            self._matrix_of(form)
        for node in () if as_matrix else self.layer.products:
            self._finish(node, lambda builder, X: self._product(builder, X, form, "codes"))
        for node in self.layer.picks:
            self._replace(node, lambda builder, node=node: self._pick(builder, node, form, "codes"))

    def low_rank(self, form: LowRank) -> None:
        """Two products, or a table of short entries and a product."""
        for node in self.layer.products:
            self._finish(
                node,
                lambda builder, X: self._product(builder, self._product(builder, X, form.left, "left"), form.right, "right"),
            )
        for node in self.layer.picks:
            self._replace(
                node,
                lambda builder, node=node: self._product(
                    builder, self._pick(builder, node, form.left, "left"), form.right, "right"
                ),
            )

    def train(self, form: Train) -> None:
        """Cores in float16, which the runtime turns into the type of X when it loads the file."""

        def make(builder: Builder, X: ir.Value) -> ir.Value:
            cores = self._keep("cores", form.cores)
            self.graph.opset_imports[DOMAIN] = VERSION
            if self._dtype != ir.DataType.FLOAT16:
                cores = builder.node("Cast", cores, like=self.layer.value, to=self._dtype)
            shape = None if X.shape is None else [*X.shape[:-1], form.layout.cols]
            product = ir.Value(type=self.layer.value.type, shape=None if shape is None else ir.Shape(shape))
            return builder.ours("MPOLinear", X, cores, like=product, **form.attributes)

        for node in self.layer.products:
            self._finish(node, make)

    def _matrix_of(self, form: Quantized) -> None:
        """The matrix of codes in the place of the weight, but for the picks from a table."""
        builder, full = self._first(), {"dtype": ir.DataType.FLOAT}
        scales = builder.node("Cast", self._keep("codes_scales", form.scales.T), to=ir.DataType.FLOAT, **full)
        self._function(decoding.blocks_function, form.bits)
        codes = self._keep("codes", form.packed())
        matrix = builder.node(f"Blocks{form.bits}", codes, scales, domain=decoding.DOMAIN, **full)
        if form.scales.shape[0] * form.block > len(form.codes):
            matrix = builder.node("Slice", matrix, [0], [len(form.codes)], [1], **full)
        if not self.layer.transposed:
            matrix = builder.node("Transpose", matrix, perm=[1, 0], **full)
        matrix.shape = self.layer.value.shape
        self._take_place(matrix, but=self.layer.picks)

    def _pairs(self, bits: int) -> ir.Value:
        """The table of pairs, made once per model."""
        name = f"{decoding.DOMAIN}/pairs{bits}"
        for node in self.graph:
            if node.outputs[0].name == name:
                return node.outputs[0]
        known = self.graph.initializers.get(f"{decoding.DOMAIN}/table")
        values = known if known is not None else self._keep("table", table(), f"{decoding.DOMAIN}/table")
        self._function(decoding.pairs_function, bits)
        pairs = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT16))
        node = ir.Node(decoding.DOMAIN, f"Pairs{bits}", [values], outputs=[pairs], name=f"{name}_node")
        self.graph.insert_before(self.graph[0], node)
        return pairs

    def _function(self, make, bits: int) -> None:
        """Add a function to the model, once."""
        add_function(self.model, make(bits, self.model.opset_imports[""]))

    def _first(self, what: str = "") -> Builder:
        """Nodes right before the first use of the weight, and not inside of loops, which would make them anew each time."""
        if self.layer.is_stack:
            return Builder(self.graph[0], self.layer.name + what)
        users = {use.node for use in self.layer.value.uses()}
        return Builder(next(node for node in self.graph if node in users), self.layer.name + what)

    def _take_place(self, value: ir.Value, but: tuple[ir.Node, ...] = ()) -> None:
        """A value of the same matrix in all uses of the weight, but for those by some nodes."""
        for use in tuple(self.layer.value.uses()):
            if use.node is not value.producer() and use.node not in but:
                use.node.replace_input_with(use.idx, value)

    @property
    def _dtype(self) -> ir.DataType:
        return self.layer.value.const_value.dtype

    def _product(self, builder: Builder, X: ir.Value, form: Quantized, what: str) -> ir.Value:
        shape = None if X.shape is None else [*X.shape[:-1], form.codes.shape[1]]
        packed = self._keep(what, form.packed())
        self.graph.opset_imports[RUNTIME] = 1
        return builder.node(
            "MatMulNBits",
            X,
            packed,
            self._scales(form, what, flat=True),
            like=self.layer.value,
            shape=shape,
            domain=RUNTIME,
            K=form.codes.shape[0],
            N=form.codes.shape[1],
            bits=form.bits,
            block_size=form.block,
            accuracy_level=self.level,
        )

    def _pick(self, builder: Builder, node: ir.Node, form: Quantized, what: str) -> ir.Value:
        indices = node.inputs[1]
        packed = form.packed()
        self.graph.opset_imports[RUNTIME] = 1
        entries, width = self.layer.shape[:-1], form.codes.shape[0]
        if self.layer.products:  # a product wants three axes of the same numbers
            table = builder.node("Reshape", self._keep(what, packed), [*entries, -1], dtype=ir.DataType.UINT8)
        else:
            table = self._keep(what, packed.reshape(*entries, -1))
        scales = self._scales(form, what, flat=False)
        shape = None if indices.shape is None else [*indices.shape, *entries[1:], width]
        return builder.node(
            "GatherBlockQuantized",
            table,
            indices,
            scales,
            like=self.layer.value,
            shape=shape,
            domain=RUNTIME,
            bits=form.bits,
            block_size=form.block,
            gather_axis=0,
            quantize_axis=len(entries),
        )

    def _scales(self, form: Quantized, what: str, flat: bool) -> ir.Value:
        """Made once, before all that uses the weight."""
        if (what, flat) in self.scales:
            return self.scales[what, flat]
        by_column = form.scales.T
        if not flat:
            by_column = by_column.reshape(*self.layer.shape[:-1], -1)
        elif not self.layer.picks:
            by_column = by_column.reshape(-1)
        scales, builder = self._keep(f"{what}_scales", by_column), self._first(f"/{what}{'/flat' * flat}")
        if self._dtype != ir.DataType.FLOAT16:
            scales = builder.node("Cast", scales, like=self.layer.value, to=self._dtype)
        if flat and self.layer.picks:
            scales = builder.node("Reshape", scales, [-1], like=scales)
        self.scales[what, flat] = scales
        return scales

    def _keep(self, what: str, array: np.ndarray, name: str | None = None) -> ir.Value:
        """An initializer, made once per layer."""
        name = name or f"{self.layer.name}/{what}"
        if name not in self.stored:
            self.stored[name] = initializer(self.graph, name, array)
        return self.stored[name]

    def _finish(self, node: ir.Node, make) -> None:
        """Replace a MatMul, or a Gemm with what it adds."""
        bias = node.inputs[2] if is_op(node, "Gemm") and len(node.inputs) > 2 else None

        def build(builder: Builder) -> ir.Value:
            value = make(builder, node.inputs[0])
            return value if bias is None else builder.node("Add", value, bias, like=value, shape=value.shape)

        self._replace(node, build)

    def _replace(self, node: ir.Node, make) -> None:
        hand_over(node, [make(Builder(node))])
