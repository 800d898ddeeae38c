"""Attention as it is spelled more rarely, in the form of spellings.py."""

from spellings import BIAS, HALF, HEADS, JOINED, KEEP, KT, LOW, SCALE, SOFT, Spelling

HALVES = HEADS.replace("float", "float16")


def repeated(op, times, v_times="", *, axis, inputs="", heads="{0, 4, -1, 8}", output="float[u,4,l,8] y"):
    """Key and value heads, 2 by default, repeated along a new axis by Expand or Tile."""
    each = "{x}1 = Unsqueeze({x}, at) {x}2 = {op}({x}1, {x}_times) {x}3 = Reshape({x}2, heads) "
    return Spelling(
        "".join(each.format(x=x, op=op) for x in "kv")
        + "kt = Transpose<perm=[0,1,3,2]>(k3) s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = MatMul(p, v3)",
        inputs=inputs or "float[b,4,l,8] q, float[b,2,s,8] k, float[b,2,s,8] v",
        constants=f"int64[1] at = {{{axis}}}, int64[5] k_times = {times}, int64[5] v_times = {v_times or times}, "
        f"int64[4] heads = {heads}",
        output=output,
    )


def folded(op, times):
    """Groups of 4 query heads in the second axis, their 2 key heads repeated in it and folded into the batch."""
    each = "{x}1 = Unsqueeze({x}, two) {x}2 = {op}({x}1, times) {x}3 = Reshape({x}2, fold) "
    return Spelling(
        "".join(each.format(x=x, op=op) for x in "kv")
        + "q1 = Reshape(q, fold) kt = Transpose<perm=[0,1,3,2]>(k3) s2 = MatMul(q1, kt) p = Softmax<axis=-1>(s2) "
        "o = MatMul(p, v3) y = Reshape(o, five)",
        inputs="float[b,2,4,7,8] q, float[b,2,7,8] k, float[b,2,7,8] v",
        constants=f"int64[1] two = {{2}}, int64[5] times = {times}, int64[4] fold = {{-1, 4, 7, 8}}, "
        "int64[5] five = {-1, 2, 4, 7, 8}",
        output="float[b,2,4,7,8] y",
    )


def expanded(target, nodes=""):
    """Groups of 4 query heads in an axis of their own, in which 2 key heads are repeated."""
    return Spelling(
        f"{nodes} k1 = Unsqueeze(k, two) k2 = Expand(k1, to) v1 = Unsqueeze(v, two) v2 = Expand(v1, to) "
        "kt = Transpose<perm=[0,1,2,4,3]>(k2) s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = MatMul(p, v2)",
        inputs="float[b,2,4,l,8] q, float[b,2,s,8] k, float[b,2,s,8] v",
        constants="int64[1] two = {2}" + target,
        output="float[b,2,4,l,8] y",
    )


FUSED = {
    "scores in float32 of a float16 model": Spelling(
        "q1 = Cast<to=1>(q) k1 = Cast<to=1>(k) kt = Transpose<perm=[0,1,3,2]>(k1) s1 = MatMul(q1, kt) s2 = Div(s1, c) "
        "p0 = Softmax<axis=-1>(s2) p = Cast<to=10>(p0) y = MatMul(p, v)",
        inputs=HALVES,
        constants=SCALE,
        output="float16[b,4,l,8] y",
    ),
    "scores in float32, batched over heads": Spelling(
        "q1 = Cast<to=1>(q) k1 = Cast<to=1>(k) kt = Transpose<perm=[0,2,1]>(k1) s2 = MatMul(q1, kt) "
        "p0 = Softmax<axis=-1>(s2) p = Cast<to=10>(p0) y = MatMul(p, v)",
        inputs=JOINED.replace("float", "float16"),
        output="float16[n,l,8] y",
    ),
    "values in float32 of float16 scores": Spelling(
        KT + "s0 = MatMul(q, kt) s2 = Cast<to=1>(s0) " + SOFT,
        inputs="float16[b,4,l,8] q, float16[b,4,s,8] k, float[b,4,s,8] v",
    ),
    "a scale per head": Spelling(
        KT + "s0 = MatMul(q, kt) e = Exp(t) s1 = Mul(s0, e) s2 = Add(s1, bias) " + SOFT,
        inputs=HEADS + BIAS + ", float[4,1,1] t",
    ),
    "a divisor per query": Spelling(
        KT + "s0 = MatMul(q, kt) e = Exp(t) s2 = Div(s0, e) " + SOFT, inputs=HEADS + ", float[b,1,l,1] t"
    ),
    "a negative scale": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Mul(s0, n) s2 = Mul(s1, h) " + SOFT,
        inputs=HEADS,
        constants=HALF + ", float n = {-1.5}",
    ),
    "a negative scale on q": Spelling(
        KT + "q1 = Mul(q, n) s2 = MatMul(q1, kt) " + SOFT, inputs=HEADS, constants="float n = {-0.5}"
    ),
    "values and probabilities transposed": Spelling(
        KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) pt = Transpose<perm=[0,1,3,2]>(p) "
        "sh = Shape(pt) vt = Transpose<perm=[0,1,3,2]>(v) o = MatMul(vt, pt) y = Transpose<perm=[0,1,3,2]>(o)",
        output="float[b,4,l,8] y, int64[4] sh",
    ),
    "images as columns": Spelling(
        "qt = Transpose<perm=[0,2,1]>(q) s1 = MatMul(qt, k) s2 = Mul(s1, h) p = Softmax<axis=2>(s2) sh = Shape(p) "
        "pt = Transpose<perm=[0,2,1]>(p) pt1 = Identity(pt) y = MatMul(v, pt1)",
        inputs="float[b,8,l] q, float[b,8,s] k, float[b,8,s] v",
        constants=HALF,
        output="float[b,8,l] y, int64[3] sh",
    ),
    "transposed by the runtime's product": Spelling(
        KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = com.microsoft.FusedMatMul<transA=1, transB=1>(v, p)",
        output="float[b,4,8,l] y",
    ),
    "transposed for an einsum": Spelling(
        KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) pt = Transpose<perm=[0,1,3,2]>(p) "
        'y = Einsum<equation="bhsl,bhsd->bhld">(pt, v)',
    ),
    "softmax over the fourth axis of joined heads": Spelling(
        "kt = Transpose<perm=[0,2,1]>(k) s0 = MatMul(q, kt) s1 = Reshape(s0, four) s2 = Add(s1, bias) "
        "p0 = Softmax<axis=3>(s2) p = Reshape(p0, three) y = MatMul(p, v)",
        inputs="float[8,5,8] q, float[8,7,8] k, float[8,7,8] v, float[2,1,1,7] bias",
        constants="int64[4] four = {-1, 4, 5, 7}, int64[3] three = {-1, 5, 7}",
        output="float[8,5,8] y",
    ),
    "einsum with an ellipsis": Spelling(
        's2 = Einsum<equation="...id, ...jd -> ...ij">(q, k) p = Softmax<axis=-1>(s2) '
        'y = Einsum<equation="...ij, ...jd -> ...id">(p, v)'
    ),
    "clipped to the range of float16": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Clip(s0, low, high) s2 = Clip(s1, , high) " + SOFT,
        constants="float low = {-65504}, float high = {65504}",
    ),
    "einsum in other letters": Spelling(
        's0 = Einsum<equation="Zhqx,ZhKx->ZhqK">(q, k) s2 = Mul(s0, h) p = Softmax<axis=3>(s2) '
        'y = Einsum<equation="apqr,aprt->apqt">(p, v)',
        constants=HALF,
    ),
    "a mask of more heads": Spelling(
        KT + "s0 = MatMul(q, kt) s2 = Add(s0, rel) " + SOFT,
        inputs="float[b,1,l,8] q, float[b,1,s,8] k, float[b,1,s,8] v, float[1,4,l,s] rel",
    ),
    "a mask of more batches, and their number open": Spelling(
        KT + "s0 = MatMul(q, kt) s2 = Add(s0, bias) " + SOFT,
        inputs="float[1,4,l,8] q, float[1,4,s,8] k, float[1,4,s,8] v" + BIAS,
    ),
    "factors and masks of more batches and heads": Spelling(
        KT + "s0 = MatMul(q, kt) s1 = Mul(s0, t) s3 = Add(s1, rel) s2 = Where(keep, s3, low) " + SOFT,
        inputs="float[1,1,l,8] q, float[1,1,s,8] k, float[1,1,s,8] v, float[2,1,1,1] t, float[4,l,s] rel" + KEEP,
        constants=LOW[2:],
    ),
    "keys transposed by way of three axes": Spelling(
        "k1 = Reshape(k, three) k2 = Transpose<perm=[0,2,1]>(k1) k3 = Reshape(k2, four) k4 = Mul(k3, h) s2 = MatMul(q, k4) "
        + SOFT,
        inputs="float[b,4,l,8] q, float[b,4,7,8] k, float[b,4,7,8] v",
        constants=HALF + ", int64[3] three = {-1, 7, 8}, int64[4] four = {-1, 4, 8, 7}",
    ),
    "keys in another order by way of three axes": Spelling(
        "k1 = Reshape(k, three) k2 = Transpose<perm=[0,2,1]>(k1) k3 = Reshape(k2, four) s2 = MatMul(q, k3) " + SOFT,
        inputs="float[b,4,l,8] q, float[b,4,7,8] k, float[b,4,7,8] v",
        constants="int64[3] three = {-1, 14, 8}, int64[4] four = {-1, 4, 8, 7}",
    ),
    "keys of other heads by way of three axes": Spelling(
        "k1 = Reshape(k, three) k2 = Transpose<perm=[0,2,1]>(k1) k3 = Reshape(k2, four) s2 = MatMul(q, k3) " + SOFT,
        inputs="float[4,2,l,8] q, float[2,4,7,8] k, float[4,2,7,8] v",
        constants="int64[3] three = {-1, 7, 8}, int64[4] four = {-1, 2, 8, 7}",
        output="float[4,2,l,8] y",
    ),
    "keys of other columns by way of three axes": Spelling(
        "k1 = Reshape(k, three) k2 = Transpose<perm=[0,2,1]>(k1) k3 = Reshape(k2, four) s2 = MatMul(q, k3) " + SOFT,
        constants="int64[3] three = {8, -1, 4}, int64[4] four = {-1, 4, 8, 7}",
    ),
    "grouped heads, repeated by Tile": repeated("Tile", "{1, 1, 2, 1, 1}", axis=2),
    "grouped heads, repeated by Tile before the transpose": Spelling(
        "k1 = Unsqueeze(k, three) k2 = Tile(k1, rep) k3 = Reshape(k2, heads) kt = Transpose<perm=[0,2,3,1]>(k3) "
        "v1 = Unsqueeze(v, three) v2 = Tile(v1, rep) v3 = Reshape(v2, heads) v4 = Transpose<perm=[0,2,1,3]>(v3) "
        "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = MatMul(p, v4)",
        inputs="float[b,4,l,8] q, float[b,s,2,8] k, float[b,s,2,8] v",
        constants="int64 three = {3}, int64[5] rep = {1, 1, 1, 2, 1}, int64[4] heads = {0, 0, -1, 8}",
    ),
    "heads repeated as a whole": repeated("Tile", "{1, 2, 1, 1, 1}", axis=1),
    "heads repeated as a whole by Expand": repeated("Expand", "{1, 2, 1, 1, 1}", axis=1),
    "heads and batches repeated": repeated(
        "Tile", "{2, 1, 2, 1, 1}", axis=2, inputs="float[4,4,l,8] q, float[2,2,s,8] k, float[2,2,s,8] v"
    ),
    "heads and batches repeated by Expand": repeated(
        "Expand", "{3, 1, 2, 1, 1}", axis=2, inputs="float[3,4,l,8] q, float[1,2,s,8] k, float[1,2,s,8] v"
    ),
    "heads repeated and cut in halves": repeated(
        "Expand",
        "{1, 1, 2, 1, 1}",
        axis=2,
        inputs="float[b,8,l,4] q, float[b,2,s,8] k, float[b,2,s,8] v",
        heads="{0, 8, -1, 4}",
        output="float[b,8,l,4] y",
    ),
    "heads repeated and folded into the batch": folded("Expand", "{1, 1, 4, 1, 1}"),
    "heads repeated by Tile and folded into the batch": folded("Tile", "{1, 1, 4, 1, 1}"),
    "groups of heads, expanded by ones": expanded(", int64[5] to = {1, 1, 4, 1, 1}"),
    "groups of heads, expanded by their number alone": expanded(", int64[3] to = {4, 1, 1}"),
    "queries expanded along their rows": Spelling(
        KT + "q1 = Expand(q, to) s2 = MatMul(q1, kt) " + SOFT,
        inputs="float[b,t,1,8] q, float[b,t,s,8] k, float[b,t,s,8] v",
        constants="int64[2] to = {5, 8}",
        output="float[b,t,5,8] y",
    ),
    "groups of heads, expanded to sizes": expanded(
        ", int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i3 = {3}, int64[1] four = {4}",
        "sh = Shape(k) b0 = Slice(sh, i0, i1) rest = Slice(sh, two, i3) h0 = Slice(sh, i1, two) d0 = Slice(sh, i3, four) "
        "to = Concat<axis=0>(b0, h0, four, rest, d0)",
    ),
    "a mask multiplied and added, as GPT has it": Spelling(
        KT
        + "f = Cast<to=1>(keep) n = Sub(one, f) a = Mul(low, n) s0 = MatMul(q, kt) s1 = Mul(s0, f) s2 = Add(s1, a) "
        + SOFT,
        inputs=HEADS + KEEP,
        constants="float one = {1}, float low = {-10000}",
    ),
    "a mask multiplied and taken off, beside a bias": Spelling(
        KT
        + "n = Sub(one, tri) a = Mul(n, low) s0 = MatMul(q, kt) s1 = Mul(tri, s0) s3 = Sub(s1, a) s2 = Add(s3, rel) "
        + SOFT,
        inputs="float[b,4,2,8] q, float[b,4,3,8] k, float[b,4,3,8] v, float[1,4,2,3] rel",
        constants="float one = {1}, float low = {10000}, float[1,1,2,3] tri = {1, 1, 0, 1, 1, 1}",
        output="float[b,4,2,8] y",
    ),
    "images joined to pixels": Spelling(
        "q1 = Reshape(q, flat) k1 = Reshape(k, flat) v1 = Reshape(v, flat) qt = Transpose<perm=[0,2,1]>(q1) "
        "s2 = MatMul(qt, k1) p = Softmax<axis=2>(s2) pt = Transpose<perm=[0,2,1]>(p) o = MatMul(v1, pt) "
        "y = Reshape(o, image)",
        inputs="float[t,4,2,3] q, float[t,4,2,3] k, float[t,4,2,3] v",
        constants="int64[3] flat = {0, 4, -1}, int64[4] image = {0, 4, 2, 3}",
        output="float[t,4,2,3] y",
    ),
    "two views joined to one row": Spelling(
        "q1 = Reshape(q, row) k1 = Reshape(k, row) v1 = Reshape(v, row) kt = Transpose<perm=[0,2,1]>(k1) "
        "s2 = MatMul(q1, kt) p = Softmax<axis=-1>(s2) o = MatMul(p, v1) sh = Shape(q) y = Reshape(o, sh)",
        inputs="float[t,2,l,8] q, float[t,2,l,8] k, float[t,2,l,8] v",
        constants="int64[3] row = {0, -1, 8}",
        output="float[t,2,l,8] y",
    ),
    "joined heads, their rows left open": Spelling(
        "sh = Shape(q) b0 = Gather<axis=0>(sh, zero) n0 = Mul(b0, four) n1 = Unsqueeze(n0, at) "
        "to = Concat<axis=0>(n1, rest) "
        "q1 = Reshape(q, to) k1 = Reshape(k, to) v1 = Reshape(v, to) kt = Transpose<perm=[0,2,1]>(k1) s2 = MatMul(q1, kt) "
        "p = Softmax<axis=-1>(s2) o = MatMul(p, v1) y = Reshape(o, sh)",
        constants="int64 zero = {0}, int64 four = {4}, int64[1] at = {0}, int64[2] rest = {-1, 8}",
    ),
    "joined heads of two batches, their rows left open": Spelling(
        "q1 = Reshape(q, to) k1 = Reshape(k, to) v1 = Reshape(v, to) kt = Transpose<perm=[0,2,1]>(k1) s2 = MatMul(q1, kt) "
        "p = Softmax<axis=-1>(s2) o = MatMul(p, v1) sh = Shape(q) y = Reshape(o, sh)",
        inputs=HEADS.replace("[b,", "[2,"),
        constants="int64[3] to = {8, -1, 8}",
        output="float[2,4,l,8] y",
    ),
    "keys and values in other groups": repeated(
        "Tile",
        "{1, 1, 2, 1, 1}",
        "{1, 1, 4, 1, 1}",
        axis=2,
        inputs="float[b,4,l,8] q, float[b,2,s,8] k, float[b,1,s,8] v",
    ),
}

DECLINED = {
    "a floor that scores reach": (
        Spelling(KT + "s0 = MatMul(q, kt) s2 = Max(s0, low) " + SOFT, constants="float low = {100000}"),
        "Max that changes them",
    ),
    "a ceiling that scores reach": (
        Spelling(KT + "s0 = MatMul(q, kt) s2 = Clip(s0, low, high) " + SOFT, constants=LOW[2:] + ", float high = {1}"),
        "Clip that changes them",
    ),
    "groups that were rows of the queries": (
        Spelling(
            KT + "s2 = MatMul(q, kt) p0 = Softmax<axis=-1>(s2) p = Reshape(p0, four) y = MatMul(p, v)",
            inputs="float[b,2,10,8] q, float[b,2,7,8] k, float[b,4,7,8] v",
            constants="int64[4] four = {0, 4, 5, 7}",
            output="float[b,4,5,8] y",
        ),
        "reshaped between the products",
    ),
    "heads that were rows of the queries": (
        Spelling(
            "kt = Transpose<perm=[0,2,1]>(k) s0 = MatMul(q, kt) s1 = Reshape(s0, four) s2 = Add(s1, row) "
            "p0 = Softmax<axis=-1>(s2) p = Reshape(p0, three) y = MatMul(p, v)",
            inputs="float[b,20,8] q, float[b,5,8] k, float[b,5,8] v, float[5,1,5] row",
            constants="int64[4] four = {-1, 5, 4, 5}, int64[3] three = {-1, 20, 5}",
            output="float[b,20,8] y",
        ),
        "rows of its queries (multi-query attention)",
    ),
    "keys before queries": (
        Spelling(
            "s2 = MatMul(k, q) p = Softmax<axis=1>(s2) y = MatMul(v, p)",
            inputs="float[b,8,l] q, float[b,s,8] k, float[b,8,s] v",
            output="float[b,8,l] y",
        ),
        "axis 1 of 3",
    ),
    "queries weighed instead of keys": (
        Spelling(
            KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) pt = Transpose<perm=[0,1,3,2]>(p) y = MatMul(pt, v)",
            inputs=HEADS.replace("float[b,4,s,8] v", "float[b,4,l,8] v"),
            output="float[b,4,s,8] y",
        ),
        "weigh no values",
    ),
    "probabilities of another order": (
        Spelling(
            KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) pt = Transpose<perm=[1,0,2,3]>(p) y = MatMul(pt, v)",
            inputs="float[4,4,l,8] q, float[4,4,s,8] k, float[4,4,s,8] v",
            output="float[4,4,l,8] y",
        ),
        "pass Transpose",
    ),
    "a negative scale of the runtime's product": (
        Spelling("s2 = com.microsoft.FusedMatMul<transB=1, alpha=-0.35>(q, k) " + SOFT),
        "scaled by -0.35",
    ),
    "double precision of the values": (
        Spelling(
            KT + "s0 = MatMul(q, kt) s2 = Cast<to=11>(s0) " + SOFT,
            inputs="float[b,4,l,8] q, float[b,4,s,8] k, double[b,4,s,8] v",
            output="double[b,4,l,8] y",
        ),
        "double",
    ),
}
