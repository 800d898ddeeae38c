"""Attention whose softmax is written by hand, in the form of spellings.py."""

from axes_spellings import LAST
from spellings import HEADS, KT, LOW, Spelling

TOP = KT + "x = MatMul(q, kt) m = ReduceMax<axes=[-1]>(x) "
EXP = TOP + "d = Sub(x, m) e = Exp(d) "
SUM = "t = ReduceSum(e, last) "
LASTS = "int64[1] last = {-1}"
DIV = "p = Div(e, t) y = MatMul(p, v)"
# of one size, so that axes may be taken for one another
CUBES = "float[4,4,4,8] q, float[4,4,4,8] k, float[4,4,4,8] v"
CUBE = "float[4,4,4,8] y"

FUSED = {
    "a softmax by hand": Spelling(EXP + SUM + DIV, constants=LASTS),
    "a softmax by hand without the maximum": Spelling(KT + "x = MatMul(q, kt) e = Exp(x) " + SUM + DIV, constants=LASTS),
    "a softmax by hand over a bias that is subtracted": Spelling(
        KT + "x = MatMul(q, kt) d = Sub(x, bias) e = Exp(d) " + SUM + DIV,
        inputs=HEADS + ", float[b,1,1,s] bias",
        constants=LASTS,
    ),
    "a softmax by hand, masked": Spelling(
        KT + "x0 = MatMul(q, kt) x = Where(keep, x0, low) m = ReduceMax<axes=[3]>(x) d = Sub(x, m) e = Exp(d) " + SUM + DIV,
        inputs=HEADS + ", bool[b,1,l,s] keep",
        constants=LASTS + LOW,
    ),
    "a softmax by hand, reciprocal": Spelling(
        EXP + SUM + "r = Reciprocal(t) p = Mul(r, e) y = MatMul(p, v)", constants=LASTS
    ),
    "a softmax by hand, a small number in the sum": Spelling(
        EXP + SUM + "t1 = Add(t, tiny) p = Div(e, t1) y = MatMul(p, v)", constants=LASTS + ", float tiny = {1e-9}"
    ),
    "a softmax by hand as jax writes it": Spelling(
        's0 = Einsum<equation="btkgh,bskh->bkgts">(q, k) x = Mul(s0, h) m0 = ReduceMax<axes=[4], keepdims=0>(x) '
        "m1 = Max(m0, low) m2 = Unsqueeze(m1, last) sh = Shape(x) m3 = Expand(m2, sh) m = Identity(m3) d = Sub(x, m) "
        "e = Exp(d) t0 = ReduceSum<keepdims=0>(e, four) at = Shape(t0) to = Concat<axis=0>(at, one) t1 = Reshape(t0, to) "
        't = Expand(t1, sh) p = Div(e, t) y = Einsum<equation="bkgts,bskh->btkgh">(p, v)',
        inputs=LAST,
        constants=LASTS + LOW + ", float h = {0.35}, int64[1] four = {4}, int64[1] one = {1}",
        output="float[b,l,2,3,8] y",
    ),
}

DECLINED = {
    "exponentials that are masked": (
        Spelling(
            EXP + "g = Mul(e, keep) t = ReduceSum(g, last) p = Div(g, t) y = MatMul(p, v)",
            inputs=HEADS + ", float[b,1,1,s] keep",
            constants=LASTS,
        ),
        "pass Mul",
    ),
    "a sum with one more": (
        Spelling(EXP + SUM + "t1 = Add(t, one) p = Div(e, t1) y = MatMul(p, v)", constants=LASTS + ", float one = {1}"),
        "not divided by their sum",
    ),
    "a small number in a sum without the maximum": (
        Spelling(
            KT + "x = MatMul(q, kt) e = Exp(x) " + SUM + "t1 = Add(t, tiny) p = Div(e, t1) y = MatMul(p, v)",
            constants=LASTS + ", float tiny = {1e-9}",
        ),
        "not divided by their sum",
    ),
    "a small number in a sum beside another maximum": (
        Spelling(
            KT + "x = MatMul(q, kt) m = ReduceMax<axes=[-1]>(bias) d = Sub(x, m) e = Exp(d) " + SUM + "t1 = Add(t, tiny) "
            "p = Div(e, t1) y = MatMul(p, v)",
            inputs=HEADS + ", float[b,1,1,s] bias",
            constants=LASTS + ", float tiny = {1e-9}",
        ),
        "not divided by their sum",
    ),
    "a sum without its axis": (
        Spelling(EXP + "t = ReduceSum<keepdims=0>(e, last) " + DIV, inputs=CUBES, constants=LASTS, output=CUBE),
        "not divided by their sum",
    ),
    "a sum expanded along other axes": (
        Spelling(
            EXP + "t0 = ReduceSum<keepdims=0>(e, last) sh = Shape(e) t = Expand(t0, sh) " + DIV,
            inputs=CUBES,
            constants=LASTS,
            output=CUBE,
        ),
        "not divided by their sum",
    ),
    "a sum over its exponentials": (
        Spelling(EXP + SUM + "p = Div(t, e) y = MatMul(p, v)", constants=LASTS),
        "not divided by their sum",
    ),
    "a sum over the queries": (
        Spelling(EXP + "t = ReduceSum(e, two) " + DIV, constants=LASTS + ", int64[1] two = {2}"),
        "other axes than the last",
    ),
    "a quotient behind the values": (
        Spelling(EXP + SUM + "o = MatMul(e, v) y = Div(o, t)", constants=LASTS),
        "weigh the values before",
    ),
    "sums that are used elsewhere": (
        Spelling(EXP + SUM + DIV, constants=LASTS, output="float[b,4,l,8] y, float[b,4,l,1] t"),
        "used for more than a quotient",
    ),
    "exponentials that are used elsewhere": (
        Spelling(EXP + SUM + DIV, constants=LASTS, output="float[b,4,l,8] y, float[b,4,l,s] e"),
        "used for more than their sum",
    ),
    "a difference to another maximum": (
        Spelling(KT + "x = MatMul(q, kt) m = ReduceMax<axes=[2]>(x) d = Sub(x, m) e = Exp(d) " + SUM + DIV, constants=LASTS),
        "scores are also used by ReduceMax",
    ),
}
