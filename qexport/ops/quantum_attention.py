"""QuantumAttention: attention by sampling, a superset of ai.onnx `Attention` (opset 25)."""

from qexport.ops.spec import Attr, OpSpec, Param

STRATEGIES = ("exact", "naive", "stratified", "adaptive", "hybrid")

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")

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
    ),
    attributes=(
        Attr("strategy", "string", "How keys are sampled; see docs/math.md.", "stratified", choices=STRATEGIES),
        Attr("num_samples", "ints", "Keys sampled per query: one number, or one per query head.", (32,), minimum=1),
        Attr("control_variate", "int", "1: sample in proportion to p |v - mean v| around the mean of V.", 1, choices=(0, 1)),
        Attr("layer", "int", "Number of the site in its model; part of the random counter.", 0, minimum=0),
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
        Attr("left_window_size", "int", "Keys further left of the query than this are not seen; -1 is off.", -1, minimum=-1),
        Attr("right_window_size", "int", "Keys further right of the query than this are not seen; -1 is off.", -1, minimum=-1),
        Attr("softmax_precision", "int", "Accepted as in Attention; the softmax is always float32.", choices=(1, 10, 11, 16)),
    ),
    type_vars={"T": FLOATS, "M": ("tensor(bool)", *FLOATS), "I": ("tensor(int64)",)},
    fallback="ai.onnx Attention (classical, not sampled)",
)
