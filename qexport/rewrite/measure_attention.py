"""measure_attention: attention as a noisy device would compute it, from probabilities to measured frequencies to values.

    QuantumAttention(Q, K, V, ...) -> present_value, P          strategy exact, P its probabilities
    QuantumNoise(P, level * noise_scale)                        one per model, in the order of the recipe
    what the query does not see is discarded                    where a mask, a causal order or a window hides keys
    QuantumMeasure(., seed)                                     unless shots are infinite
    MatMul(., present_value)                                    grouped heads stacked along the rows

Outcomes that stand for nothing are discarded and measured again, as whoever reads the device can tell them: states
n .. 2^q - 1 and keys that the query must not see. Otherwise a causal model would learn of later tokens through the noise.
Only then: between two models all states are there, as on the device, and what the first one moved to a state beyond n the
second may bring back. One model by itself divides by what is left (`renormalize` = 1) and needs no padding.
"""

import numpy as np
import onnx_ir as ir

from qexport.noise.model import NoiseModel, parse_noise
from qexport.ops import QUANTUM_ATTENTION, QUANTUM_NOISE
from qexport.recipe_values import INFINITE
from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import Builder, attribute
from qexport.rewrite.masks import number_like
from qexport.rewrite.values import known_size

# The first release whose Attention gives the values on although it got no past ones.
MIN_ONNXRUNTIME = (1, 24)
PROBABILITIES_MODE = 3
_OUTPUTS = [param.name for param in QUANTUM_ATTENTION.outputs]
_PRESENT_VALUE, _PROBABILITIES = _OUTPUTS.index("present_value"), _OUTPUTS.index("qk_matmul_output")
PROBABILITY_OUTPUTS = _PROBABILITIES + 1
_INPUTS = [param.name for param in QUANTUM_ATTENTION.inputs]
_NONPAD, _SEED = _INPUTS.index("nonpad_kv_seqlen"), _INPUTS.index("seed")


def check_noise(node: ir.Node) -> None:
    """Raise DeclinedError, with the reason, for an Attention whose probabilities cannot be measured."""
    scores = node.outputs[_PROBABILITIES] if len(node.outputs) > _PROBABILITIES else None
    if scores is not None and (scores.uses() or scores.is_graph_output()):
        raise DeclinedError("its scores are used elsewhere too, where noise would not reach them")
    if len(node.inputs) > _NONPAD and node.inputs[_NONPAD] is not None:
        raise DeclinedError("its keys lie in a cache that is appended in place; the register would hold its free room")


class Levels:
    """The parameters of noise models as values at the head of the graph, levels multiplied by the graph input `scale`."""

    def __init__(self, model: ir.Model, scale: ir.Value):
        self.scale = scale
        self._graph = model.graph
        self._builder = Builder(model.graph[0], stem=scale.name)
        self._made: dict[tuple, ir.Value] = {}

    def of(self, noise: NoiseModel) -> list[ir.Value | None]:
        """The inputs of QuantumNoise behind the probabilities."""
        given = noise.inputs
        return [self._value(p.name, given[p.name]) if p.name in given else None for p in QUANTUM_NOISE.inputs[1:]]

    def _value(self, name: str, number: float) -> ir.Value:
        key = (name == "level", number)
        if key not in self._made:
            self._builder.anchor = self._graph[0]  # the one before may have been replaced
            value = self._builder.const(np.float32(number))
            if name == "level":
                value = self._builder.node("Mul", value, self.scale, like=value, shape=[])
            self._made[key] = value
        return self._made[key]


def measured_output(
    builder: Builder, node: ir.Node, probabilities: ir.Node, levels: Levels, noise: str, shots, *, invert: bool = False
) -> ir.Value:
    """The output of a noisy attention.

    Args:
        node: the Attention that is replaced.
        probabilities: the QuantumAttention with PROBABILITY_OUTPUTS outputs on the same inputs, with the seed and the layer.
        noise, shots: of the recipe.
        invert: the noise, one model, is taken off the frequencies of all 2^q states by its inverse; what it says of keys
            that the query does not see, which is 0 in the mean, is dropped.
    """
    q, seed = node.inputs[0], probabilities.inputs[_SEED]
    joined = attribute(node, "q_num_heads") is not None
    present, rows = probabilities.outputs[_PRESENT_VALUE], probabilities.outputs[_PROBABILITIES]
    present.type = rows.type = q.type
    q_heads, kv_heads, head_size = _sizes(node)
    present.shape = ir.Shape([None, kv_heads, None, head_size])
    rows.shape = ir.Shape([None, q_heads, None, None])

    models = parse_noise(noise)
    padded = invert or len(models) > 1
    found = _all_states(builder, rows) if padded else rows
    for model in models:
        kept = {"renormalize": int(not padded), **model.attributes}
        found = builder.ours("QuantumNoise", found, *levels.of(model), like=rows, **kept)
    if not invert:
        found = _discard(builder, found, rows, padded, _hides_keys(node))
    if shots != INFINITE:
        found = builder.ours("QuantumMeasure", found, seed, like=rows, shots=shots, layer=attribute(probabilities, "layer"))
    if invert:
        (model,) = models
        found = builder.ours("QuantumNoise", found, *levels.of(model), like=rows, inverse=1, **model.attributes)
        found = _seen(builder, _keys(builder, found, rows), rows)
    output = _weighed(builder, found, present, q_heads is not None and q_heads == kv_heads)
    if joined:
        output = builder.transpose(output, [0, 2, 1, 3])
        output = builder.node("Reshape", output, builder.const(np.array([0, 0, -1])), like=rows, shape=[None, None, None])
    return output


def _sizes(node: ir.Node) -> tuple[int | None, int | None, int | None]:
    """(q_heads, kv_heads, size of a value) of an Attention, None where the graph does not tell."""
    q, v = node.inputs[0], node.inputs[2]
    q_heads, kv_heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
    if q_heads is None:
        return known_size(q, 1), known_size(v, 1), known_size(v, 3)
    width = known_size(v, 2)
    return q_heads, kv_heads, width // kv_heads if width else None


def _all_states(builder: Builder, rows: ir.Value) -> ir.Value:
    """(.., n) filled up with zeros to (.., 2^q), q = ceil(log2 n)."""
    double = {"dtype": ir.DataType.DOUBLE, "shape": [1]}
    n = builder.axes(rows, 3, 4)
    log = builder.node("Log", builder.node("Cast", n, to=ir.DataType.DOUBLE.value, **double), **double)
    log2 = builder.node("Mul", log, builder.const(np.array([1 / np.log(2)])), **double)
    # rounding must not turn a whole number into the next one; no n has a logarithm so little above one
    qubits = builder.node("Ceil", builder.node("Sub", log2, builder.const(np.array([1e-9])), **double), **double)
    states = builder.node("Pow", builder.const(np.array([2.0])), qubits, **double)
    states = builder.node("Cast", states, to=ir.DataType.INT64.value, dtype=ir.DataType.INT64, shape=[1])
    missing = builder.node("Sub", states, n, dtype=ir.DataType.INT64, shape=[1])
    pads = builder.concat([0] * 7, missing)
    return builder.node("Pad", rows, pads, like=rows, shape=[*rows.shape[:3], None])


def _hides_keys(node: ir.Node) -> bool:
    """Whether a query may not see all keys."""
    masked = len(node.inputs) > 3 and node.inputs[3] is not None
    window = any(attribute(node, f"{side}_window_size", -1) >= 0 for side in ("left", "right"))
    return masked or window or bool(attribute(node, "is_causal", 0))


def _keys(builder: Builder, found: ir.Value, rows: ir.Value) -> ir.Value:
    """The states of all 2^q that stand for keys."""
    return builder.node("Slice", found, [0], builder.axes(rows, 3, 4), [3], like=rows, shape=rows.shape)


def _discard(builder: Builder, noisy: ir.Value, rows: ir.Value, padded: bool, hides_keys: bool) -> ir.Value:
    """`noisy` without states that stand for no key and keys of probability 0, divided by what is left; zeros where nothing
    is."""
    if not (padded or hides_keys):
        return noisy
    kept = _keys(builder, noisy, rows) if padded else noisy
    kept = _seen(builder, kept, rows) if hides_keys else kept
    total_shape = [*rows.shape[:3], 1]
    total = builder.node("ReduceSum", kept, [-1], like=rows, shape=total_shape, keepdims=1)
    some = builder.node("Cast", total, to=ir.DataType.BOOL.value, dtype=ir.DataType.BOOL, shape=total_shape)
    divisor = builder.node("Where", some, total, number_like(builder, 1.0, rows), like=rows, shape=total_shape)
    return builder.node("Div", kept, divisor, like=rows, shape=rows.shape)


def _seen(builder: Builder, found: ir.Value, rows: ir.Value) -> ir.Value:
    """`found` where the probability is not 0, else 0."""
    sign = builder.node("Sign", rows, like=rows, shape=rows.shape)
    return builder.node("Mul", found, sign, like=rows, shape=rows.shape)


def _weighed(builder: Builder, frequencies: ir.Value, values: ir.Value, equal_heads: bool) -> ir.Value:
    """(batch, q_heads, q_len, kv_len) times (batch, kv_heads, kv_len, head_size); the query heads of a group are stacked
    along the rows of one product."""
    batch, q_heads, q_len, _ = frequencies.shape
    shape = [batch, q_heads, q_len, values.shape[3]]
    if equal_heads:
        return builder.node("MatMul", frequencies, values, like=values, shape=shape)
    kv_heads = values.shape[1]
    grouped = builder.concat([0], builder.axes(values, 1, 2), [-1], builder.axes(frequencies, 3, 4))
    stacked = builder.node("Reshape", frequencies, grouped, like=values, shape=[batch, kv_heads, None, None])
    product = builder.node("MatMul", stacked, values, like=values, shape=[batch, kv_heads, None, values.shape[3]])
    back = builder.concat(builder.axes(frequencies, 0, 3), builder.axes(values, 3, 4))
    return builder.node("Reshape", product, back, like=values, shape=shape)
