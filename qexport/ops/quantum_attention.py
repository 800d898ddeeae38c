"""QuantumAttention: attention by sampling, a superset of ai.onnx `Attention` (opset 25)."""

from qexport.errors import UsageError
from qexport.ops.spec import Attr, OpSpec, Param
from qexport.ops.strategies import PRECISIONS, RESIDUALS, STRATEGIES, reads

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")


def _check(values: dict) -> None:
    strategy = values["strategy"]
    if not reads(strategy, "precision", values["precision"]):
        raise UsageError(
            f"[QuantumAttention] precision must be fp32 or auto with strategy {strategy}, got {values['precision']}"
        )
    if not reads(strategy, "error_tolerance", values["error_tolerance"]):
        raise UsageError(f"[QuantumAttention] error_tolerance needs strategy tree, got {strategy}; set it to 0")


SPEC = OpSpec(
    name="QuantumAttention",
    stem="quantum_attention",
    summary="Scaled dot-product attention whose weighted sum over the keys is estimated from `num_samples` keys per query.",
    inputs=(
        Param("Q", "T", "(batch, q_heads, q_len, head_size) or (batch, q_len, q_heads * head_size)", "Queries."),
        Param("K", "T", "(batch, kv_heads, kv_len, head_size) or (batch, kv_len, kv_heads * head_size)", "Keys."),
        Param("V", "T", "(batch, kv_heads, kv_len, v_head_size) or (batch, kv_len, kv_heads * v_head_size)", "Values."),
        Param(
            "attn_mask",
            "M",
            "broadcastable to (batch, q_heads, q_len, total_len)",
            "Boolean (true = attend) or float of Q's type (added to the scores); a shorter last axis is padded with 'no'.",
            optional=True,
        ),
        Param("past_key", "T", "(batch, kv_heads, past_len, head_size)", "Keys of earlier steps.", optional=True),
        Param("past_value", "T", "(batch, kv_heads, past_len, v_head_size)", "Values of earlier steps.", optional=True),
        Param(
            "nonpad_kv_seqlen",
            "I",
            "(batch,)",
            "Number of valid keys of each batch item; not together with past_key.",
            optional=True,
        ),
        Param("seed", "I", "()", "Seed of the draws; 0 when absent.", optional=True),
        Param(
            "key_summary",
            "E",
            "(batch, kv_heads, chunks, floats), see docs/math.md",
            "tree with nonpad_kv_seqlen: what decoding keeps of the cache, zeros at first.",
            optional=True,
        ),
    ),
    outputs=(
        Param("Y", "T", "as Q, with v_head_size", "The attention output."),
        Param("present_key", "T", "(batch, kv_heads, total_len, head_size)", "past_key and K joined.", optional=True),
        Param("present_value", "T", "(batch, kv_heads, total_len, v_head_size)", "past_value and V joined.", optional=True),
        Param(
            "qk_matmul_output",
            "T",
            "(batch, q_heads, q_len, total_len)",
            "Scores or probabilities, see qk_matmul_output_mode; never sampled.",
            optional=True,
        ),
        Param(
            "error_estimate",
            "E",
            "(batch, q_heads)",
            "Estimated relative Frobenius error of the head's output; strategies exact (0) and tree.",
            optional=True,
        ),
        Param(
            "present_key_summary",
            "E",
            "as key_summary",
            "key_summary after this step; may be the same memory.",
            optional=True,
        ),
    ),
    attributes=(
        Attr("strategy", "string", "How keys are sampled; see docs/math.md.", "stratified", choices=STRATEGIES),
        Attr("num_samples", "ints", "Keys read per query: a number, or one per head.", (32,), minimum=1, maximum=2**31 - 1),
        Attr(
            "control_variate",
            "int",
            "1: sample in proportion to p |v - mean v| around mean v; hybrid: its largest exactly, the others by a mean. "
            "Off where is_causal is set.",
            1,
            choices=(0, 1),
        ),
        Attr(
            "precision",
            "string",
            "Lowest precision of products that may be used; exact and tree only.",
            "fp32",
            choices=PRECISIONS,
        ),
        Attr(
            "error_tolerance",
            "float",
            "tree: a head reads more keys until its relative error, as measured, holds this; 0 is off.",
            0.0,
            minimum=0,
            maximum=1,
        ),
        Attr(
            "residual",
            "string",
            "tree: what the sampled residual of the unread keys does to the output.",
            "verify_only",
            choices=RESIDUALS,
        ),
        Attr(
            "layer", "int", "Number of the site in its model; part of the random counter.", 0, minimum=0, maximum=2**32 - 1
        ),
        Attr("is_causal", "int", "1: query i sees key j when j <= i + offset.", 0, choices=(0, 1)),
        Attr("scale", "float", "Factor on Q K^T; 1/sqrt(head_size) when absent."),
        Attr("softcap", "float", "Scores become softcap * tanh(score / softcap); 0 is off.", 0.0, minimum=0),
        Attr("q_num_heads", "int", "Query heads; needed with 3-D inputs.", minimum=1),
        Attr("kv_num_heads", "int", "Key and value heads; needed with 3-D inputs.", minimum=1),
        Attr(
            "qk_matmul_output_mode",
            "int",
            "0: scores, 1: after softcap, 2: after the mask, 3: probabilities.",
            0,
            choices=(0, 1, 2, 3),
        ),
        Attr("left_window_size", "int", "How far to the left a query sees; -1: all the way.", -1, minimum=-1),
        Attr("right_window_size", "int", "How far to the right a query sees; -1: all the way.", -1, minimum=-1),
        Attr("softmax_precision", "int", "Accepted as in Attention; always float32 here.", choices=(1, 10, 11, 16)),
    ),
    type_vars={"T": FLOATS, "M": ("tensor(bool)", *FLOATS), "I": ("tensor(int64)",), "E": ("tensor(float)",)},
    fallback="ai.onnx Attention (classical, not sampled)",
    check=_check,
)


def fallback_nodes(opset: int, num_outputs: int):
    """The classical body: standard nodes over the names of SPEC that produce its first `num_outputs` outputs.

    From opset 23 on it is one `Attention` node. Below, Attention does not exist and the body is spelled out in MatMul and
    Softmax; it then needs 4-D Q, K, V, a float attn_mask (add zeros where there is none) and `scale` on the node, and
    knows no past, softcap, causal flag or window, and of qk_matmul_output the probabilities alone: the rewrite gives such
    nodes only. The sixth output needs the input key_summary on every node: it is that, unchanged.
    """
    if opset < 17:
        raise UsageError(f"[QuantumAttention] the fallback needs opset 17 or newer, got {opset}")
    if opset >= 23:
        return _attention_body(opset, num_outputs)
    if num_outputs > 4:
        raise UsageError(f"[QuantumAttention] the fallback below opset 23 has 4 outputs, got num_outputs {num_outputs}")
    return _decomposed_body(num_outputs)


def _attention_body(opset: int, num_outputs: int):
    from onnx import AttributeProto, helper

    names = {
        "is_causal": AttributeProto.INT,
        "kv_num_heads": AttributeProto.INT,
        "q_num_heads": AttributeProto.INT,
        "qk_matmul_output_mode": AttributeProto.INT,
        "scale": AttributeProto.FLOAT,
        "softcap": AttributeProto.FLOAT,
        "softmax_precision": AttributeProto.INT,
    }
    if opset >= 25:
        names |= {"left_window_size": AttributeProto.INT, "right_window_size": AttributeProto.INT}
    inputs = ["Q", "K", "V", "attn_mask", "past_key", "past_value"] + (["nonpad_kv_seqlen"] if opset >= 24 else [])
    node = helper.make_node("Attention", inputs, [param.name for param in SPEC.outputs[: min(num_outputs, 4)]])
    node.attribute.extend(AttributeProto(name=n, type=t, ref_attr_name=n) for n, t in names.items())
    nodes = [node, *_no_error(node)] if num_outputs > 4 else [node]
    if num_outputs > 5:
        nodes.append(helper.make_node("Identity", ["key_summary"], ["present_key_summary"]))
    return nodes


def _no_error(attention):
    """error_estimate of the classical body: zeros of (batch, q_heads). Only Attention itself knows the heads of 3-D inputs:
    a second one over the first query and key tells them."""
    from onnx import helper

    make = helper.make_node
    one_row = helper.make_node("Attention", ["Q_row", "K_row", "V_row"], ["Y_row", "", "", "row_scores"])
    one_row.attribute.extend(a for a in attention.attribute if a.name.endswith("num_heads"))
    return [
        make("Constant", [], ["row_begin"], value_ints=[0]),
        make("Constant", [], ["row_end"], value_ints=[1]),
        make("Constant", [], ["row_axis"], value_ints=[-2]),
        *(make("Slice", [x, "row_begin", "row_end", "row_axis"], [f"{x}_row"]) for x in "QKV"),
        one_row,
        make("Shape", ["row_scores"], ["error_shape"], start=0, end=2),
        make("ConstantOfShape", ["error_shape"], ["error_estimate"]),
    ]


def _decomposed_body(num_outputs: int):
    """Grouped heads without repeating K and V: the G query heads of a kv head are stacked along the rows of one MatMul."""
    from onnx import AttributeProto, helper

    def const(name, value):
        return helper.make_node("Constant", [], [name], value_ints=value)

    scale = helper.make_node("Constant", [], ["scale_f32"])
    scale.attribute.append(AttributeProto(name="value_float", type=AttributeProto.FLOAT, ref_attr_name="scale"))
    make = helper.make_node
    present = [("K", "present_key"), ("V", "present_value"), ("probabilities", "qk_matmul_output")]
    return [
        scale,
        make("CastLike", ["scale_f32", "Q"], ["scale_t"]),
        make("Mul", ["Q", "scale_t"], ["Q_scaled"]),
        make("Shape", ["Q"], ["q_rows"], start=0, end=3),  # batch, q_heads, q_len
        make("Shape", ["Q"], ["head_size"], start=3, end=4),
        make("Shape", ["K"], ["kv_heads"], start=1, end=2),
        make("Shape", ["K"], ["kv_len"], start=2, end=3),
        make("Shape", ["V"], ["v_head_size"], start=3, end=4),
        const("keep", [0]),
        const("rest", [-1]),
        make("Concat", ["keep", "kv_heads", "rest", "head_size"], ["grouped_shape"], axis=0),
        make("Reshape", ["Q_scaled", "grouped_shape"], ["Q_grouped"]),
        make("Transpose", ["K"], ["K_transposed"], perm=[0, 1, 3, 2]),
        make("MatMul", ["Q_grouped", "K_transposed"], ["scores_grouped"]),
        make("Concat", ["q_rows", "kv_len"], ["scores_shape"], axis=0),
        make("Reshape", ["scores_grouped", "scores_shape"], ["scores"]),
        make("Add", ["scores", "attn_mask"], ["scores_masked"]),
        make("Softmax", ["scores_masked"], ["probabilities"], axis=-1),
        make("Shape", ["scores_grouped"], ["scores_grouped_shape"]),
        make("Reshape", ["probabilities", "scores_grouped_shape"], ["probabilities_grouped"]),
        make("MatMul", ["probabilities_grouped", "V"], ["Y_grouped"]),
        make("Concat", ["q_rows", "v_head_size"], ["Y_shape"], axis=0),
        make("Reshape", ["Y_grouped", "Y_shape"], ["Y"]),
        *(make("Identity", [x], [y]) for x, y in present[: num_outputs - 1]),
    ]


def infer_shapes(ctx) -> None:
    """Type and shape inference for onnx (an `onnx.shape_inference.InferenceContext`): what `Attention` infers."""
    from onnx import TensorProto, TypeProto

    def shape_of(i):
        if not ctx.has_input(i) or not ctx.get_input_type(i).tensor_type.HasField("shape"):
            return None
        return list(ctx.get_input_type(i).tensor_type.shape.dim)

    def attribute(name):
        value = ctx.get_attribute(name)
        return value.i if value is not None else None

    def give(i, dims):
        if not ctx.has_output(i):
            return
        result = TypeProto()
        is_float = SPEC.outputs[i].type_var == "E"
        result.tensor_type.elem_type = TensorProto.FLOAT if is_float else ctx.get_input_type(0).tensor_type.elem_type
        if dims is not None:
            result.tensor_type.shape.SetInParent()
            for dim in dims:
                new = result.tensor_type.shape.dim.add()
                if isinstance(dim, int):
                    new.dim_value = dim
                elif dim is not None:
                    new.CopyFrom(dim)
        ctx.set_output_type(i, result)

    def known(dim):
        return dim.dim_value if dim.HasField("dim_value") else None

    def quotient(dim, n):
        return known(dim) // n if known(dim) is not None and n else None

    def total(past, new):
        if past is None:
            return new
        return known(past) + known(new) if known(past) is not None and known(new) is not None else None

    q, k, v = shape_of(0), shape_of(1), shape_of(2)
    past = shape_of(4)
    if q is None or k is None or v is None or len({len(q), len(k), len(v)}) != 1 or len(q) not in (3, 4):
        for i in range(len(SPEC.outputs)):
            give(i, None)
        return
    q_heads, kv_heads = attribute("q_num_heads"), attribute("kv_num_heads")
    if len(q) == 3:
        v_size = quotient(v[2], kv_heads)
        give(0, [q[0], q[1], v_size * q_heads if v_size and q_heads else None])
        heads = [q[0], kv_heads]
        sizes = quotient(k[2], kv_heads), v_size
        q_heads, q_len, kv_len = q_heads, q[1], k[1]
    else:
        give(0, [q[0], q[1], q[2], v[3]])
        heads, sizes = [k[0], k[1]], (k[3], v[3])
        q_heads, q_len, kv_len = q[1], q[2], k[2]
    total_len = total(past[2], kv_len) if past is not None else (None if ctx.has_input(4) else kv_len)
    give(1, [*heads, total_len, sizes[0]])
    give(2, [*heads, total_len, sizes[1]])
    give(3, [q[0], q_heads, q_len, total_len])
    give(4, [q[0], q_heads])
    give(5, shape_of(8))
