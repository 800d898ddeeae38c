"""Products of whole numbers: X W with X rounded to 8 bits as it runs, and W to 7 bits as the runtime loads the file.

Whatever the form that W is stored in, once it is a matrix it gets one scale for each output, and X one for all of it, so
that the sums are sums of whole numbers. Before that, entry k of X is multiplied with e_k and row k of W divided by it. An
entry that is larger than all others would cost them their digits otherwise (SmoothQuant, Xiao et al., ICML 2023). Here

    e_k = (|W_k| / |X_k|)^(1/2)

with W_k the row and X_k what the calibration saw of the entry, which makes |X e| |W / e|, the product of the Frobenius
norms, least (by Cauchy and Schwarz).

The nodes are standard ones. onnxruntime makes one node of those of a product (DynamicQuantizeMatMul where no other product
reads X, else MatMulIntegerToFloat), with the codes of W as a constant.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qexport.compression import decoding
from qexport.compression.calibration import input_names, positions, weights_of
from qexport.compression.checkpoint import Checkpoint
from qexport.compression.layers import Layer
from qexport.compression.nodes import add_function, initializer
from qexport.rewrite.graph import Builder, attribute, is_op
from qexport.rewrite.sample_attention import hand_over

FLOAT = ir.DataType.FLOAT
# Entries and rows that are smaller than this share of the root mean square of all count as so large: other inputs use them.
LEAST = 1e-2
# Multiply-adds in float32 that take as long as it takes to round one number of X: fewer outputs gain nothing.
ROUNDING = 32


@dataclass(frozen=True)
class Rounded:
    """Weights whose products read the same input, and are products of whole numbers: it is rounded once for all of them.

    Attributes:
        layers: names of the weights.
        saved: multiply-adds that are no longer in float32, on the data of the calibration.
        ease: float16 (in,), the e above; None for ones, which cost no multiplication.
    """

    layers: tuple[str, ...]
    saved: float
    ease: np.ndarray | None = field(default=None, compare=False, repr=False)

    def plain(self) -> "Rounded":
        """The same without ease."""
        return replace(self, ease=None)

    def matrix(self, W: np.ndarray) -> np.ndarray:
        """What a product multiplies with in place of W (in, out)."""
        ease = 1 if self.ease is None else self.ease.astype(np.float32)[:, None]
        eased = W / ease
        scales = np.maximum(np.abs(eased).max(0) / decoding.TOP, decoding.LEAST_STEP)
        return np.rint(eased / scales) * scales * ease


def names_of(rounded: tuple[Rounded, ...]) -> set[str]:
    """The weights of such products."""
    return {name for group in rounded for name in group.layers}


def label_of(rounded: tuple[Rounded, ...]) -> str:
    """What tells findings about such products from others; nothing where there are none."""
    how = ("eased and rounded", "rounded as it is")
    return "".join(f", {' '.join(group.layers)} {how[group.ease is None]}" for group in rounded)


def candidates(layers: list[Layer], store: Checkpoint) -> list[Rounded]:
    """Products that can be such ones, by their input, in the order of the graph: those with weights of float32 and enough
    outputs for each input that is rounded."""
    groups: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        if layer.products and layer.value.const_value.dtype == FLOAT:
            groups.setdefault(input_names(layer), []).append(layer)
    return [found for group in groups.values() if (found := _rounded(group, store)).saved > 0]


def _rounded(group: list[Layer], store: Checkpoint) -> Rounded:
    matrices = [layer.matrix() for layer in group]
    seen = np.sqrt(np.diag(weights_of(group[0], store)))
    size = np.sqrt(sum(np.square(W).sum(1, dtype=np.float64) for W in matrices))
    ease = np.sqrt(_floored(size) / _floored(seen))
    outputs = sum(W.shape[1] for W in matrices)
    return Rounded(
        tuple(layer.name for layer in group),
        float(positions(group[0], store)) * len(ease) * (outputs - ROUNDING),
        (ease / np.median(ease)).astype(np.float16),
    )


def _floored(sizes: np.ndarray) -> np.ndarray:
    """Sizes of which none is nothing, as shares of their root mean square."""
    mean = np.sqrt(np.square(sizes).mean())
    return np.maximum(sizes / mean, LEAST) if mean else np.ones_like(sizes)


def multiply(model: ir.Model, layers: list[Layer], chosen: tuple[Rounded, ...]) -> None:
    """Make products of whole numbers of the float products of weights, whatever these are computed from by now.

    Args:
        layers: those of the model, found before anything else took the place of their weights.
        chosen: which ones, with their ease.
    """
    if not chosen:
        return
    known, place = {layer.name: layer for layer in layers}, {node: i for i, node in enumerate(model.graph)}
    add_function(model, decoding.columns_function(model.opset_imports[""]))
    for group in chosen:
        products = [node for name in group.layers for node in known[name].products]
        rounded: dict[ir.Value, tuple[ir.Value, ...]] = {}
        products.sort(key=place.__getitem__)  # the first one rounds for all
        ease = None if group.ease is None else _ease(model, products[0], group)
        for node in products:
            builder = Builder(node)
            if node.inputs[0] not in rounded:
                rounded[node.inputs[0]] = _round(builder, node.inputs[0], ease)
            hand_over(node, [_product(builder, node, ease, *rounded[node.inputs[0]])])
    _keep_sums(model)


def _ease(model: ir.Model, before: ir.Node, group: Rounded) -> ir.Value:
    half = initializer(model.graph, f"{group.layers[0]}/ease", group.ease)
    return Builder(before, half.name).node("Cast", half, to=FLOAT, dtype=FLOAT, shape=group.ease.shape)


def _round(builder: Builder, X: ir.Value, ease: ir.Value | None) -> tuple[ir.Value, ...]:
    """The codes of X, their step and their zero."""
    eased = X if ease is None else builder.node("Mul", X, ease, dtype=FLOAT, shape=X.shape)
    kinds = ir.DataType.UINT8, FLOAT, ir.DataType.UINT8
    return builder.several("DynamicQuantizeLinear", eased, dtypes=kinds, shapes=(X.shape, (), ()))


def _product(
    builder: Builder, node: ir.Node, ease: ir.Value | None, X: ir.Value, step: ir.Value, zero: ir.Value
) -> ir.Value:
    W, full = node.inputs[1], {"dtype": FLOAT, "shape": node.outputs[0].shape}
    if attribute(node, "transB", 0):
        W = builder.node("Transpose", W, dtype=FLOAT, perm=[1, 0])
    if ease is not None:
        W = builder.node("Div", W, builder.node("Unsqueeze", ease, [1], dtype=FLOAT), dtype=FLOAT)
    codes, steps = builder.several("Columns", W, domain=decoding.DOMAIN, dtypes=(ir.DataType.INT8, FLOAT))
    sums = builder.node("MatMulInteger", X, codes, zero, dtype=ir.DataType.INT32, shape=node.outputs[0].shape)
    value = builder.node(
        "Mul", builder.node("Cast", sums, to=FLOAT, **full), builder.node("Mul", step, steps, dtype=FLOAT), **full
    )
    bias = node.inputs[2] if len(node.inputs) > 2 else None  # of a Gemm
    return value if bias is None else builder.node("Add", value, bias, **full)


def _keep_sums(model: ir.Model) -> None:
    """Additions before a LayerNormalization as Sum. onnxruntime makes one node of Add and LayerNormalization, which takes
    some three times as long as the two (SkipLayerNormalization; measured with 1.31 and 1.32), and leaves Sum alone."""
    for node in model.graph:
        if is_op(node, "LayerNormalization") and is_op(node.inputs[0].producer(), "Add"):
            node.inputs[0].producer().op_type = "Sum"
