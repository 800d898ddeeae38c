"""cache_attention: what declines, and that a graph in which something declines is left as it was."""

import numpy as np
import onnx_ir as ir
import pytest
from harness import parse

from qexport.rewrite.cache_attention import cache_attention
from qexport.rewrite.classical import to_classical
from qexport.sources.onnx_file import infer_shapes

LENGTH = 12
# Q, K and V are the embedded tokens and positions, split into two heads; MASK makes `mask` from what is there.
GRAPH = """
<ir_version: 10, opset_import: ["" : 24]>
g (int64[b, s] ids, int64[b, s] places, float[2, 2, 12, 12] bias, float[b, 2, 5, 4] other) => (float[b, 2, s, 4] y)
<float[20, 8] words, float[12, 8] table>
{
  split = Constant <value_ints = [0, 0, 2, 4]> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  minus = Constant <value_int = -1> ()
  zeros = Constant <value_ints = [0]> ()
  word = Gather (words, ids)
  place = Gather (table, places)
  x = Add (word, place)
  parts = Reshape (x, split)
  q = Transpose <perm = [0, 2, 1, 3]> (parts)
  count = Shape <start = 1, end = 2> (ids)
  n = Squeeze (count, zeros)
  steps = Range (zero, n, one)
  columns = Unsqueeze (steps, zeros)
  last = Constant <value_ints = [1]> ()
  rows = Unsqueeze (steps, last)
  causal = LessOrEqual (columns, rows)
  MASK
  y = ATTENTION
}
"""
CAUSAL = "mask = Identity (causal)"
WITH_MASK = "Attention (q, q, q, mask)"


def graph(mask: str, attention: str) -> ir.Model:
    proto = parse(GRAPH.replace("MASK", mask).replace("ATTENTION", attention))
    rng = np.random.default_rng(0)
    model = ir.from_proto(proto)
    for name, shape in (("words", (20, 8)), ("table", (12, 8))):
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        old = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        old.replace_all_uses_with(value)
        model.graph.initializers.pop(name, None)
        model.graph.register_initializer(value)
    infer_shapes(model)
    to_classical(model, 24)
    return model


def cached(mask: str, attention: str = WITH_MASK):
    model = graph(mask, attention)
    return model, *cache_attention(model, LENGTH, "ids", "places")


@pytest.mark.parametrize(
    ("mask", "attention", "has_window"),
    [
        (CAUSAL, WITH_MASK, False),
        ("mask = Identity (causal)", "Attention <is_causal = 1> (q, q, q)", False),
        (
            "d = Sub (rows, columns) w = Constant <value_int = 4> () near = Less (d, w) mask = And (causal, near)",
            WITH_MASK,
            True,
        ),
        (
            "d = Sub (rows, columns) w = Constant <value_int = 12> () near = Less (d, w) mask = And (causal, near)",
            WITH_MASK,
            False,
        ),
        (
            "low = Constant <value_float = -10000.0> () nothing = Constant <value_float = 0.0> () "
            "mask = Where (causal, nothing, low)",
            WITH_MASK,
            False,
        ),
    ],
)
def test_what_gets_a_cache(mask, attention, has_window):
    """Causal however it is written; a window as long as the cache is none."""
    model, pairs, left_alone = cached(mask, attention)
    assert left_alone == []
    assert pairs == [(f"past_key_values.0.{part}", f"present.0.{part}") for part in ("key", "value")]
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    assert node.attributes["is_causal"].value == 1
    assert (node.inputs[3] is not None) == has_window
    assert "places" not in {value.name for value in model.graph.inputs}


@pytest.mark.parametrize(
    ("mask", "attention", "reason"),
    [
        (CAUSAL, "Attention (q, q, q)", "it is not causal: later tokens change what earlier ones see"),
        ("mask = GreaterOrEqual (columns, rows)", WITH_MASK, "neither causal nor a window"),
        (
            "d = Sub (columns, rows) f = Cast <to = 1> (d) low = Constant <value_float = -10000.0> () "
            "mask = Where (causal, f, low)",
            WITH_MASK,
            "a bias is added to its scores that depends on the distance",
        ),
        (
            "pad = Equal (ids, zero) kept = Not (pad) where = Constant <value_ints = [1, 2]> () "
            "wide = Unsqueeze (kept, where) mask = And (causal, wide)",
            WITH_MASK,
            "its mask is computed from the tokens",
        ),
        ("mask = Identity (bias)", WITH_MASK, "its mask is computed from the input 'bias'"),
        (
            "half = Constant <value_int = 2> () w = Div (n, half) d = Sub (rows, columns) near = Less (d, w) "
            "mask = And (causal, near)",
            WITH_MASK,
            "its mask depends on the length of the text",
        ),
        (
            CAUSAL,
            "Attention <is_causal = 1> (q, other, other)",
            "not those of its own queries alone, as in cross-attention",
        ),
    ],
)
def test_what_declines(mask, attention, reason):
    model, pairs, left_alone = cached(mask, attention)
    assert pairs == []
    assert reason in left_alone[0].reason
    assert not [node for node in model.graph if node.op_type == "TensorScatter"]
    assert "places" in {value.name for value in model.graph.inputs}
