"""Attention that is left alone, in the form of spellings.py, and words of the reason."""

from spellings import HEADS, KEEP, KT, SOFT, Spelling

DECLINED = {
    "probabilities are an output": (
        Spelling(KT + "s2 = MatMul(q, kt) " + SOFT, output="float[b,4,l,8] y, float[b,4,l,s] p"),
        "also used by an output of the graph",
    ),
    "probabilities are used elsewhere": (
        Spelling(
            KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) m = ReduceMean<axes=[1]>(p) y = MatMul(p, v)",
            output="float[b,4,l,8] y, float[b,1,l,s] m",
        ),
        "also used by ReduceMean",
    ),
    "scores are used elsewhere": (
        Spelling(KT + "s2 = MatMul(q, kt) " + SOFT, output="float[b,4,l,8] y, float[b,4,l,s] s2"),
        "scores are also used",
    ),
    "softmax over the queries": (
        Spelling(KT + "s2 = MatMul(q, kt) p = Softmax<axis=2>(s2) y = MatMul(p, v)"),
        "axis 2 of 4",
    ),
    "disentangled attention": (
        Spelling(
            KT + "s0 = MatMul(q, kt) c2p = MatMul(q, table) g = GatherElements<axis=3>(c2p, where) s2 = Add(s0, g) " + SOFT,
            inputs=HEADS + ", int64[b,4,l,s] where, float[1,4,8,12] table",
        ),
        "computed from the queries or keys",
    ),
    "scores multiplied by what is no mask": (
        Spelling(
            KT + "n = Sub(one, w) a = Mul(n, low) s0 = MatMul(q, kt) s1 = Mul(s0, w) s2 = Add(s1, a) " + SOFT,
            inputs=HEADS + ", float[1,1,l,s] w",
            constants="float one = {1}, float low = {-10000}",
        ),
        "multiplied element by element",
    ),
    "a second product in the scores": (
        Spelling(
            KT + "s0 = MatMul(q, kt) s1 = MatMul(q, table) s2 = Add(s0, s1) " + SOFT,
            inputs=HEADS + ", float[1,4,8,s] table",
        ),
        "sum of two products",
    ),
    "dropout in training": (
        Spelling(
            KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) d, m = Dropout<seed=7>(p, r, on) y = MatMul(d, v)",
            constants="float r = {0.1}, bool on = {1}",
        ),
        "training mode",
    ),
    "masked scores keep weight": (
        Spelling(
            KT + "s0 = MatMul(q, kt) s2 = Where(keep, s0, low) " + SOFT,
            inputs=HEADS + KEEP,
            constants="float low = {-2}",
        ),
        "still leaves them weight",
    ),
    "scores scaled element by element": (
        Spelling(KT + "s0 = MatMul(q, kt) s2 = Mul(s0, rel) " + SOFT, inputs=HEADS + ", float[1,4,l,s] rel"),
        "element by element",
    ),
    "probabilities scaled": (
        Spelling(
            KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) g = Mul(p, gate) y = MatMul(g, v)",
            inputs=HEADS + ", float[1,4,1,1] gate",
        ),
        "pass Mul",
    ),
    "quantised probabilities": (
        Spelling(
            KT + "s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) pq, ps, pz = DynamicQuantizeLinear(p) "
            "vq, vs, vz = DynamicQuantizeLinear(v) o = MatMulInteger(pq, vq, pz, vz) f = Cast<to=1>(o) "
            "s = Mul(ps, vs) y = Mul(f, s)"
        ),
        "quantised",
    ),
    "quantised scores": (
        Spelling(
            KT + "qq, qs, qz = DynamicQuantizeLinear(q) kq, ks, kz = DynamicQuantizeLinear(kt) "
            "o = MatMulInteger(qq, kq, qz, kz) "
            "f = Cast<to=1>(o) s = Mul(qs, ks) s2 = Mul(f, s) " + SOFT
        ),
        "quantised",
    ),
    "double precision": (
        Spelling(
            KT + "s2 = MatMul(q, kt) " + SOFT,
            inputs=HEADS.replace("float", "double"),
            output="double[b,4,l,8] y",
        ),
        "double",
    ),
    "attention over a constant table": (
        Spelling(
            "s2 = MatMul(q, table) " + SOFT,
            inputs="float[b,1,l,2] q, float[b,1,3,8] v",
            constants="float[1,1,2,3] table = {1, 2, 3, 4, 5, 6}",
            output="float[b,1,l,8] y",
        ),
        "constants of the model",
    ),
}
