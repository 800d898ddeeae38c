"""Attention with a sink, a score beside those of the keys that has no value, in the form of spellings.py."""

from spellings import BIAS, HEADS, KT, Spelling

SCORES = KT + "s0 = MatMul(q, kt) "
SOFT = "p0 = Softmax<axis=-1>(s2) p = Slice(p0, zero, minus, three) y = MatMul(p, v)"
CUT = "int64[1] zero = {0}, int64[1] minus = {-1}, int64[1] three = {3}"
SINK = HEADS + ", float[b,4,l,1] sink"
PER_HEAD = HEADS + ", float[4] level"
SPREAD = "l0 = Reshape(level, column) sh = Shape(s1) rows = Slice(sh, zero, three, zero) to = Concat<axis=0>(rows, one) "
TO_HEADS = CUT + ", int64[4] column = {1, -1, 1, 1}, int64[1] one = {1}"

FUSED = {
    "a sink beside the keys": Spelling(
        SCORES + "s2 = Concat<axis=-1>(s0, sink) " + SOFT, inputs=SINK, constants=CUT, output="float[b,4,l,8] y"
    ),
    "a sink per head, a scale, a bias, and the maximum taken off": Spelling(
        SCORES + "s3 = Mul(s0, h) s1 = Add(s3, bias) " + SPREAD + "sink = Expand(l0, to) s4 = Concat<axis=3>(s1, sink) "
        "m = ReduceMax<axes=[3]>(s4) s2 = Sub(s4, m) " + SOFT,
        inputs=PER_HEAD + BIAS,
        constants=TO_HEADS + ", float h = {0.3}",
    ),
    "a sink beside masked keys": Spelling(
        SCORES + "s1 = Where(keep, s0, low) s2 = Concat<axis=-1>(s1, sink) " + SOFT,
        inputs=SINK + ", bool[b,1,l,s] keep",
        constants=CUT + ", float low = {-3.0e38}",
    ),
    "a sink and groups of heads": Spelling(
        "k1 = Unsqueeze(k, two) k2 = Expand(k1, times) k3 = Reshape(k2, heads) "
        "v1 = Unsqueeze(v, two) v2 = Expand(v1, times) v3 = Reshape(v2, heads) "
        "kt = Transpose<perm=[0,1,3,2]>(k3) s0 = MatMul(q, kt) s2 = Concat<axis=-1>(s0, sink) "
        + SOFT.replace("(p, v)", "(p, v3)"),
        inputs="float[b,4,l,8] q, float[b,2,s,8] k, float[b,2,s,8] v, float[b,4,l,1] sink",
        constants=CUT + ", int64[1] two = {2}, int64[5] times = {1, 1, 2, 1, 1}, int64[4] heads = {0, 4, -1, 8}",
    ),
    "the maximum taken off before a Softmax": Spelling(
        SCORES + "m = ReduceMax<axes=[-1]>(s0) s2 = Sub(s0, m) p = Softmax<axis=-1>(s2) y = MatMul(p, v)"
    ),
}

DECLINED = {
    "keys whose weight is dropped": (
        Spelling(
            SCORES + "s2 = Identity(s0) " + SOFT.replace("MatMul(p, v)", "MatMul(p, w)"),
            inputs="float[b,4,l,8] q, float[b,4,7,8] k, float[b,4,6,8] w",
            constants=CUT,
        ),
        "pass Slice",
    ),
    "a sink with a value": (
        Spelling(
            SCORES + "s2 = Concat<axis=-1>(s0, sink) p = Softmax<axis=-1>(s2) y = MatMul(p, w)",
            inputs="float[b,4,l,8] q, float[b,4,6,8] k, float[b,4,7,8] w, float[b,4,l,1] sink",
        ),
        "whose weight is used",
    ),
    "a sink beside scores with a soft cap": (
        Spelling(
            SCORES + "s1 = Div(s0, cap) s3 = Tanh(s1) s4 = Mul(s3, cap) s2 = Concat<axis=-1>(s4, sink) " + SOFT,
            inputs=SINK,
            constants=CUT + ", float cap = {5}",
        ),
        "and a soft cap",
    ),
    "a scale on keys and sink": (
        Spelling(
            SCORES + "s1 = Concat<axis=-1>(s0, sink) s2 = Mul(s1, h) " + SOFT,
            inputs=SINK,
            constants=CUT + ", float h = {0.3}",
        ),
        "together with the sink",
    ),
    "a column of scores of its own product": (
        Spelling(
            SCORES + "nt = Transpose<perm=[0,1,3,2]>(n) s1 = MatMul(q, nt) s2 = Concat<axis=-1>(s0, s1) " + SOFT,
            inputs=HEADS + ", float[b,4,1,8] n",
            constants=CUT,
        ),
        "come from Concat",
    ),
}
