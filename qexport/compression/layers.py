"""The weights of a graph that can be stored in less: matrices of products, tables that rows are picked from, and stacks of
matrices of which experts pick theirs."""

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qexport.rewrite.graph import attribute, is_op

# Smaller weights are not worth a node; norms and biases are among them.
SMALLEST = 4096
LINEAR, TABLE, EXPERTS = "linear", "table", "experts"


@dataclass(frozen=True)
class Layer:
    """One stored weight and the nodes that use it.

    Attributes:
        name: of the initializer.
        label: the torch module of its first use where the graph tells it, else that node's name.
        kinds: what it is used as: `linear`, the W of X W; `table`, whose rows are picked by index; a language model that
            ties its head to its embedding uses one weight as both; or `experts`, whose matrices are picked by index.
        transposed: whether the initializer holds W^T, as it does for a head that is tied.
        products: the nodes of the products, X on the left; `picks`: the Gather nodes.
        shape: of the initializer: (rows, columns), or of experts (experts, in, out).
    """

    name: str
    label: str
    transposed: bool
    shape: tuple[int, ...]
    products: tuple[ir.Node, ...] = field(repr=False, compare=False)
    picks: tuple[ir.Node, ...] = field(repr=False, compare=False)
    value: ir.Value = field(repr=False, compare=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """`linear`, `table` or both; or `experts`."""
        if self.is_stack:
            return (EXPERTS,)
        return (LINEAR,) * bool(self.products) + (TABLE,) * bool(self.picks)

    @property
    def is_stack(self) -> bool:
        """Whether these are matrices of experts, whose inputs nothing sees."""
        return len(self.shape) == 3

    @property
    def flat_shape(self) -> tuple[int, int]:
        """Shape of `stored()`."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the initializer."""
        return self.value.const_value.nbytes

    def stored(self) -> np.ndarray:
        """The initializer in float32; matrices of experts one below the other."""
        return self.value.const_value.numpy().astype(np.float32).reshape(self.flat_shape)

    def matrix(self) -> np.ndarray:
        """W (in, out) of a linear layer; of a table, (width, entries): what is quantised in blocks down its columns."""
        return np.ascontiguousarray(self.turned(self.stored()))

    def turned(self, array: np.ndarray) -> np.ndarray:
        """From the initializer to `matrix()` and back."""
        return array.T if self.transposed or not self.products else array

    def as_stored(self, matrix: np.ndarray) -> np.ndarray:
        """A replacement of `matrix()` as the initializer holds it, in its type."""
        return np.ascontiguousarray(self.turned(matrix), self.value.const_value.dtype.numpy()).reshape(self.shape)


def find_layers(model: ir.Model) -> list[Layer]:
    """The weights of at least SMALLEST numbers whose every use is understood, in the order of their first use.

    A use is a MatMul with W on the right, a Gemm with alpha = beta = 1, one of these behind a Transpose of W, or a Gather of
    rows; an Identity between them changes nothing. Weights are of a float type and 2-D, or 3-D where each use is a Gather
    along the first axis, in a loop or not; a weight that anything else reads stays as it is.
    """
    found = {}
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and value.name not in found and _is_weight(value, model.graph):
                found[value.name] = _layer(value, model.graph)
    return [layer for layer in found.values() if layer is not None]


def _is_weight(value: ir.Value, graph: ir.Graph) -> bool:
    tensor = value.const_value
    return (
        graph.initializers.get(value.name) is value  # and not of a subgraph, which has its own
        and not value.is_graph_input()
        and not value.is_graph_output()
        and tensor is not None
        and len(tensor.shape) in (2, 3)
        and tensor.size >= SMALLEST
        and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    )


def _layer(value: ir.Value, graph: ir.Graph) -> Layer | None:
    products, picks, ways, is_stack = [], [], set(), len(value.const_value.shape) == 3
    uses = [(use.node, use.idx, False) for use in value.uses()]
    while uses:
        node, index, turned = uses.pop(0)
        if node.graph is not graph and not is_stack:  # nothing outside sees what the weight is multiplied with
            return None
        if is_op(node, "Gather") and index == 0 and not turned and attribute(node, "axis", 0) == 0:
            picks.append(node)
        elif is_stack:
            return None
        elif is_way(node) and not (turned and node.op_type == "Transpose"):
            turned = turned or node.op_type == "Transpose"
            uses += [(use.node, use.idx, turned) for use in node.outputs[0].uses()]
            if node.outputs[0].is_graph_output():
                return None
        elif is_op(node, "MatMul") and index == 1:
            products.append(node)
            ways.add(turned)
        elif is_op(node, "Gemm") and index == 1 and _plain(node):
            products.append(node)
            ways.add(turned != bool(attribute(node, "transB", 0)))
        else:
            return None
    if len(ways) > 1 or not (products or picks) or (picks and products and ways == {False}):
        return None
    first = (products or picks)[0]
    label = first.metadata_props.get("qexport.module") or first.name or value.name
    shape = tuple(value.const_value.shape)
    return Layer(value.name, label, ways == {True}, shape, tuple(products), tuple(picks), value)


def is_way(node: ir.Node) -> bool:
    """Whether a node hands a matrix on, as it is or transposed."""
    return is_op(node, "Identity") or (is_op(node, "Transpose") and list(attribute(node, "perm", (1, 0))) == [1, 0])


def _plain(node: ir.Node) -> bool:
    return attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)
