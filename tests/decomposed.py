"""A small encoder whose attention is spelled out, as an older torch exporter writes it; made without torch."""

import numpy as np
import onnx
from onnx import numpy_helper

VOCAB, HEADS, HEAD_SIZE, POSITIONS = 40, 2, 8, 32
WIDTH = HEADS * HEAD_SIZE

_LAYER = """
  q{i} = MatMul(x{i}, wq{i}) k{i} = MatMul(x{i}, wk{i}) v{i} = MatMul(x{i}, wv{i})
  qh{i} = Reshape(q{i}, split) qt{i} = Transpose<perm=[0,2,1,3]>(qh{i})
  kh{i} = Reshape(k{i}, split) kt{i} = Transpose<perm=[0,2,3,1]>(kh{i})
  vh{i} = Reshape(v{i}, split) vt{i} = Transpose<perm=[0,2,1,3]>(vh{i})
  s{i} = MatMul(qt{i}, kt{i}) d{i} = Div(s{i}, root) a{i} = Add(d{i}, mask)
  p{i} = Softmax<axis={axis}>(a{i}) o{i} = MatMul(p{i}, vt{i})
  ot{i} = Transpose<perm=[0,2,1,3]>(o{i}) oh{i} = Reshape(ot{i}, join) x{n} = Add(x{i}, oh{i})
"""


def encoder(*, layers: int = 2, opset: int = 14, extra: str = "", outputs: str = "") -> onnx.ModelProto:
    """Token ids and a 0/1 mask to hidden states (batch, sequence, 16).

    Args:
        extra: more nodes at the end; `outputs` declares what they add to the outputs.
    """
    body = "".join(_LAYER.format(i=i, n=i + 1, axis=3 if opset < 13 else -1) for i in range(layers))
    unsqueeze = "Unsqueeze<axes=[1,2]>(attention_mask)" if opset < 13 else "Unsqueeze(attention_mask, places)"
    text = f"""
    <ir_version: 7, opset_import: ["": {opset}]>
    g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask)
    => (float[batch,sequence,{WIDTH}] hidden{outputs})
    <int64[4] split = {{0, 0, {HEADS}, {HEAD_SIZE}}}, int64[3] join = {{0, 0, {WIDTH}}}, int64[2] places = {{1, 2}},
     float root = {{{HEAD_SIZE**0.5}}}, float one = {{1}}, float low = {{-3.4028234e38}}, int64[1] zero = {{0}},
     int64[1] first = {{1}}, int64[1] second = {{2}}> {{
      e = Gather(words, input_ids) sh = Shape(input_ids) end = Slice(sh, first, second, zero)
      ids = Slice(positions, zero, end, first) pe = Gather(places_table, ids) x0 = Add(e, pe)
      m0 = {unsqueeze} m1 = Cast<to=1>(m0) m2 = Sub(one, m1) mask = Mul(m2, low)
      {body} hidden = Identity(x{layers}) {extra} }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(3)

    def add(name, array):
        model.graph.initializer.append(numpy_helper.from_array(array, name))

    add("words", rng.standard_normal((VOCAB, WIDTH)).astype(np.float32))
    add("places_table", rng.standard_normal((POSITIONS, WIDTH)).astype(np.float32))
    add("positions", np.arange(POSITIONS)[None])
    for i in range(layers):
        for name in ("wq", "wk", "wv"):
            add(f"{name}{i}", rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4)
    for node in model.graph.node:
        layer = node.output[0][-1]
        scope = f"/encoder/layer.{layer}/self" if layer.isdigit() else "/embeddings"
        node.name = f"{scope}/{node.op_type}_{node.output[0]}"
    onnx.checker.check_model(model)
    return model


def save(folder, name: str = "encoder.onnx", **arguments):
    """`encoder(...)` in a file of a folder; its path."""
    path = folder / name
    onnx.save(encoder(**arguments), path)
    return path


def feeds(batch: int = 3, sequence: int = 9) -> dict[str, np.ndarray]:
    """Token ids, and a mask whose last row is half padding."""
    rng = np.random.default_rng(5)
    mask = np.ones((batch, sequence), np.int64)
    mask[-1, sequence // 2 :] = 0
    return {"input_ids": rng.integers(0, VOCAB, (batch, sequence)), "attention_mask": mask}
