"""Attention as exporters spell it, as ONNX text: q, k, v are (b, 4, l | s, 8) unless the prologue says otherwise."""

from dataclasses import dataclass

HEADS = "float[b,4,l,8] q, float[b,4,s,8] k, float[b,4,s,8] v"
JOINED = "float[n,l,8] q, float[n,s,8] k, float[n,s,8] v"
FLAT = "float[b,l,32] q, float[b,s,32] k, float[b,s,32] v"


@dataclass(frozen=True)
class Spelling:
    """One graph: its inputs, initializers, nodes, and the opset it is written in."""

    nodes: str
    inputs: str = HEADS
    constants: str = ""
    opset: int = 17
    output: str = "float[b,4,l,8] y"
    sites: int = 1

    @property
    def text(self) -> str:
        """The model in onnx.parser's language."""
        head = f'<ir_version: 8, opset_import: ["": {self.opset}, "com.microsoft": 1]>'
        return f"{head} g ({self.inputs}) => ({self.output}) <{self.constants}> {{ {self.nodes} }}"


SCALE = "float c = {2.828427}"
HALF = "float h = {0.594604}"
SOFT = "p = Softmax<axis=-1>(s2) y = MatMul(p, v)"
KT = "kt = Transpose<perm=[0,1,3,2]>(k) "
BIAS = ", float[b,1,1,s] bias"
KEEP = ", bool[b,1,1,s] keep"
LOW = ", float low = {-3.4028234e38}"

FUSED = {
    "divided scores": Spelling(KT + "s1 = MatMul(q, kt) s2 = Div(s1, c) " + SOFT, constants=SCALE),
    "multiplied scores": Spelling(KT + "s1 = MatMul(q, kt) s2 = Mul(h, s1) " + SOFT, constants=HALF),
    "scale on q": Spelling(KT + "q1 = Div(q, c) s2 = MatMul(q1, kt) " + SOFT, constants=SCALE),
    "scale on q and k": Spelling(
        "q1 = Mul(q, h) kt = Transpose<perm=[0,1,3,2]>(k) k1 = Mul(kt, h) s2 = MatMul(q1, k1) " + SOFT, constants=HALF
    ),
    "scale under the transpose": Spelling(
        "k0 = Mul(k, h) k1 = Transpose<perm=[0,1,3,2]>(k0) s2 = MatMul(q, k1) " + SOFT, constants=HALF
    ),
    "no scale": Spelling(KT + "s2 = MatMul(q, kt) " + SOFT),
    "scale of the shape": Spelling(
        KT + "d = Shape(q) e = Gather<axis=0>(d, three) f = Cast<to=1>(e) r = Sqrt(f) "
        "s1 = MatMul(q, kt) s2 = Div(s1, r) " + SOFT,
        constants="int64 three = {3}",
    ),
    "scale of a multiple of the number of keys": Spelling(
        KT
        + "d = Shape(k) e = Gather<axis=0>(d, two) g1 = Mul(two, e) f = Cast<to=1>(g1) s1 = MatMul(q, kt) s2 = Div(s1, f) "
        + SOFT,
        constants="int64 two = {2}",
    ),
    "computed scale": Spelling(KT + "s1 = MatMul(q, kt) s2 = Mul(s1, t) " + SOFT, inputs=HEADS + ", float[1] t"),
    "opset 11, axis 3": Spelling(
        KT + "s1 = MatMul(q, kt) s2 = Div(s1, c) p = Softmax<axis=3>(s2) y = MatMul(p, v)", constants=SCALE, opset=11
    ),
    "opset 11, axis 3 of sizes that are computed": Spelling(
        "d = Shape(q) b0 = Gather<axis=0>(d, i0) l0 = Gather<axis=0>(d, i1) b1 = Unsqueeze<axes=[0]>(b0) "
        "l1 = Unsqueeze<axes=[0]>(l0) sp = Concat<axis=0>(b1, l1, four, eight) q1 = Reshape(q, sp) k1 = Reshape(k, sp) "
        "v1 = Reshape(v, sp) q2 = Transpose<perm=[0,2,1,3]>(q1) k2 = Transpose<perm=[0,2,3,1]>(k1) "
        "v2 = Transpose<perm=[0,2,1,3]>(v1) s1 = MatMul(q2, k2) s2 = Div(s1, c) p = Softmax<axis=3>(s2) y = MatMul(p, v2)",
        inputs="float[b,l,32] q, float[b,l,32] k, float[b,l,32] v",
        constants=SCALE + ", int64 i0 = {0}, int64 i1 = {1}, int64[1] four = {4}, int64[1] eight = {8}",
        opset=11,
    ),
    "heads split from the hidden size": Spelling(
        "q1 = Reshape(q, shape) q2 = Transpose<perm=[0,2,1,3]>(q1) k1 = Reshape(k, shape) "
        "k2 = Transpose<perm=[0,2,3,1]>(k1) "
        "v1 = Reshape(v, shape) v2 = Transpose<perm=[0,2,1,3]>(v1) s1 = MatMul(q2, k2) s2 = Div(s1, c) "
        "p = Softmax<axis=-1>(s2) o = MatMul(p, v2) o1 = Transpose<perm=[0,2,1,3]>(o) y = Reshape(o1, flat)",
        inputs=FLAT,
        constants=SCALE + ", int64[4] shape = {0, 0, 4, 8}, int64[3] flat = {0, 0, 32}",
        output="float[b,l,32] y",
    ),
    "packed qkv, split": Spelling(
        "x1 = Reshape(x, shape) x2 = Transpose<perm=[2,0,3,1,4]>(x1) q, k, v = Split<axis=0>(x2, ones) "
        "q1 = Squeeze(q, zero) k1 = Squeeze(k, zero) v1 = Squeeze(v, zero) kt = Transpose<perm=[0,1,3,2]>(k1) "
        "q2 = Mul(q1, h) s2 = MatMul(q2, kt) p = Softmax<axis=-1>(s2) y = MatMul(p, v1)",
        inputs="float[b,l,96] x",
        constants=HALF + ", int64[5] shape = {0, 0, 3, 4, 8}, int64[3] ones = {1, 1, 1}, int64[1] zero = {0}",
    ),
    "packed qkv, gathered": Spelling(
        "x1 = Reshape(x, shape) x2 = Transpose<perm=[2,0,3,1,4]>(x1) q = Gather<axis=0>(x2, i0) k = Gather<axis=0>(x2, i1) "
        "v = Gather<axis=0>(x2, i2) " + KT + "s1 = MatMul(q, kt) s2 = Mul(s1, h) " + SOFT,
        inputs="float[b,l,96] x",
        constants=HALF + ", int64[5] shape = {0, 0, 3, 4, 8}, int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}",
    ),
    "bias": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Div(s0, c) s2 = Add(s1, bias) " + SOFT, inputs=HEADS + BIAS, constants=SCALE
    ),
    "bias first": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Div(s0, c) s2 = Add(bias, s1) " + SOFT, inputs=HEADS + BIAS, constants=SCALE
    ),
    "bias under the scale": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Add(s0, bias) s2 = Div(s1, c) " + SOFT, inputs=HEADS + BIAS, constants=SCALE
    ),
    "subtracted bias": Spelling(KT + "s0 = MatMul(q, kt) s2 = Sub(s0, bias) " + SOFT, inputs=HEADS + BIAS),
    "relative position bias and padding": Spelling(
        KT + "s0 = MatMul(q, kt) both = Add(rel, bias) s2 = Add(s0, both) " + SOFT,
        inputs=HEADS + BIAS + ", float[1,4,l,s] rel",
    ),
    "two biases": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Add(s0, rel) s2 = Add(s1, bias) " + SOFT,
        inputs=HEADS + BIAS + ", float[4,l,s] rel",
    ),
    "rank-1 bias": Spelling(KT + "s0 = MatMul(q, kt) s2 = Add(s0, row) " + SOFT, inputs=HEADS + ", float[s] row"),
    "where keep": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Div(s0, c) s2 = Where(keep, s1, low) " + SOFT,
        inputs=HEADS + KEEP,
        constants=SCALE + LOW,
    ),
    "where drop": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Div(s0, c) drop = Not(keep) s2 = Where(drop, low, s1) " + SOFT,
        inputs=HEADS + KEEP,
        constants=SCALE + ", float low = {-10000}",
    ),
    "where and bias": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Add(s0, rel) s2 = Where(keep, s1, low) " + SOFT,
        inputs=HEADS + KEEP + ", float[1,4,l,s] rel",
        constants=LOW[2:],
    ),
    "two wheres": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Where(keep, s0, low) s2 = Where(also, s1, low) " + SOFT,
        inputs=HEADS + KEEP + ", bool[1,1,l,s] also",
        constants=LOW[2:],
    ),
    "padding as a bias": Spelling(
        KT + "m1 = Unsqueeze(pad, places) m2 = Cast<to=1>(m1) m3 = Sub(one, m2) bias = Mul(m3, low) s0 = MatMul(q, kt) "
        "s1 = Add(s0, rel) s2 = Add(s1, bias) " + SOFT,
        inputs=HEADS + ", int64[b,s] pad, float[1,4,l,s] rel",
        constants=LOW[2:] + ", float one = {1}, int64[2] places = {1, 2}",
    ),
    "floor under the scores": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Add(s0, bias) s2 = Max(s1, low) " + SOFT, inputs=HEADS + BIAS, constants=LOW[2:]
    ),
    "nan guard": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Where(keep, s0, low) p = Softmax<axis=-1>(s1) n = IsNaN(p) "
        "g = Where(n, zero, p) y = MatMul(g, v)",
        inputs=HEADS + KEEP,
        constants=LOW[2:] + ", float zero = {0}",
    ),
    "dropout and identity": Spelling(
        KT
        + "s0 = MatMul(q, kt) s1 = Identity(s0) s2 = Div(s1, c) p = Softmax<axis=-1>(s2) d, m = Dropout(p) y = MatMul(d, v)",
        constants=SCALE,
    ),
    "soft cap": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Div(s0, c) a = Div(s1, cap) t = Tanh(a) b1 = Mul(t, cap) s2 = Add(b1, bias) " + SOFT,
        inputs=HEADS + BIAS,
        constants=SCALE + ", float cap = {2.5}",
        opset=23,
    ),
    "batched over heads": Spelling(
        "kt = Transpose<perm=[0,2,1]>(k) q1 = Div(q, c) s2 = MatMul(q1, kt) " + SOFT,
        inputs=JOINED,
        constants=SCALE,
        output="float[n,l,8] y",
    ),
    "batched over heads, mask in four axes": Spelling(
        "q1 = Reshape(q, join) k1 = Reshape(k, join) v1 = Reshape(v, join) kt = Transpose<perm=[0,2,1]>(k1) "
        "s0 = MatMul(q1, kt) "
        "sh = Shape(s0) lk = Slice(sh, one, three) sp = Concat<axis=0>(open, lk) s1 = Reshape(s0, sp) s2 = Add(s1, bias) "
        "jo = Concat<axis=0>(minus, lk) s3 = Reshape(s2, jo) p = Softmax<axis=-1>(s3) o = MatMul(p, v1) "
        "y = Reshape(o, last)",
        inputs="float[b,4,6,8] q, float[b,4,6,8] k, float[b,4,6,8] v, float[b,1,1,6] bias",
        constants="int64[3] join = {-1, 6, 8}, int64[2] open = {-1, 4}, int64[1] minus = {-1}, int64[1] one = {1}, "
        "int64[1] three = {3}, int64[4] last = {-1, 4, 6, 8}",
        output="float[b,4,6,8] y",
    ),
    "batched over heads, joined mask": Spelling(
        "kt = Transpose<perm=[0,2,1]>(k) s0 = MatMul(q, kt) s2 = Add(s0, row) " + SOFT,
        inputs=JOINED + ", float[n,l,s] row",
        output="float[n,l,8] y",
    ),
    "joined and split again": Spelling(
        "q1 = Reshape(q, join) k1 = Reshape(k, join) v1 = Reshape(v, join) kt = Transpose<perm=[0,2,1]>(k1) "
        "s2 = MatMul(q1, kt) p = Softmax<axis=-1>(s2) o = MatMul(p, v1) y = Reshape(o, last)",
        inputs="float[b,4,6,8] q, float[b,4,6,8] k, float[b,4,6,8] v",
        constants="int64[3] join = {-1, 6, 8}, int64[4] last = {-1, 4, 6, 8}",
        output="float[b,4,6,8] y",
    ),
    "einsum": Spelling(
        "q1 = Reshape(q, shape) k1 = Reshape(k, shape) v1 = Reshape(v, shape) "
        's0 = Einsum<equation="blhd,bshd->bhls">(q1, k1) '
        's2 = Mul(s0, h) p = Softmax<axis=-1>(s2) o = Einsum<equation="bhls,bshd->blhd">(p, v1) y = Reshape(o, flat)',
        inputs=FLAT,
        constants=HALF + ", int64[4] shape = {0, 0, 4, 8}, int64[3] flat = {0, 0, 32}",
        output="float[b,l,32] y",
    ),
    "einsum, keys first": Spelling(
        's2 = Einsum<equation="bhsd,bhld->bhls">(k, q) p = Softmax<axis=-1>(s2) y = Einsum<equation="bhsd,bhls->bhld">(v, p)'
    ),
    "fused matmul of the runtime": Spelling(
        "s2 = com.microsoft.FusedMatMul<transB=1, alpha=0.35>(q, k) " + SOFT,
    ),
    "grouped heads, repeated": Spelling(
        "k1 = Unsqueeze(k, two) k2 = Expand(k1, rep) k3 = Reshape(k2, heads) v1 = Unsqueeze(v, two) v2 = Expand(v1, rep) "
        "v3 = Reshape(v2, heads) kt = Transpose<perm=[0,1,3,2]>(k3) s2 = MatMul(q, kt) "
        "p = Softmax<axis=-1>(s2) y = MatMul(p, v3)",
        inputs="float[b,4,l,8] q, float[b,2,s,8] k, float[b,2,s,8] v",
        constants="int64[1] two = {2}, int64[5] rep = {1, 1, 2, 1, 1}, int64[4] heads = {0, 4, -1, 8}",
    ),
    "grouped heads, repeated before the transpose": Spelling(
        "k1 = Unsqueeze(k, three) k2 = Expand(k1, rep) k3 = Reshape(k2, heads) kt = Transpose<perm=[0,2,3,1]>(k3) "
        "v1 = Unsqueeze(v, three) v2 = Expand(v1, rep) v3 = Reshape(v2, heads) v4 = Transpose<perm=[0,2,1,3]>(v3) "
        "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = MatMul(p, v4)",
        inputs="float[b,4,l,8] q, float[b,s,2,8] k, float[b,s,2,8] v",
        constants="int64[1] three = {3}, int64[5] rep = {1, 1, 1, 2, 1}, int64[4] heads = {0, 0, 4, 8}",
    ),
    "one key head for all": Spelling(
        KT + "s1 = MatMul(q, kt) s2 = Div(s1, c) " + SOFT,
        inputs="float[b,4,l,8] q, float[b,1,s,8] k, float[b,1,s,8] v",
        constants=SCALE,
    ),
    "past keys joined": Spelling(
        "present = Concat<axis=2>(past, k) presentv = Concat<axis=2>(pastv, v) kt = Transpose<perm=[0,1,3,2]>(present) "
        "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = MatMul(p, presentv)",
        inputs=HEADS + ", float[b,4,t,8] past, float[b,4,t,8] pastv",
        output="float[b,4,l,8] y, float[b,4,u,8] present, float[b,4,u,8] presentv",
    ),
    "shape of the scores is asked for": Spelling(
        KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) sh = Shape(p) y = MatMul(p, v)",
        output="float[b,4,l,8] y, int64[4] sh",
    ),
    "two layers": Spelling(
        KT + "s0 = MatMul(q, kt) p0 = Softmax<axis=-1>(s0) o = MatMul(p0, v) s2 = MatMul(o, kt) " + SOFT, sites=2
    ),
    "softmax of a classifier is no site": Spelling(
        KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) o = MatMul(p, v) y = Softmax<axis=-1>(o)"
    ),
}
