"""Attention whose products have other axes than (batch, heads, rows, columns), in the form of spellings.py."""

from spellings import BIAS, HALF, JOINED, KT, Spelling

GROUPED = "float[b,2,3,l,8] q, float[b,2,s,8] k, float[b,2,s,8] v"
GROUPED_OUT = "float[b,2,3,l,8] y"
SHARED = "k1 = Unsqueeze(k, two) v1 = Unsqueeze(v, two) kt = Transpose<perm=[0,1,2,4,3]>(k1) s0 = MatMul(q, kt) "
TWO = "int64[1] two = {2}"
WINDOWS = "float[b,t,4,l,8] q, float[b,t,4,s,8] k, float[b,t,4,s,8] v"
WINDOWS_OUT = "float[b,t,4,l,8] y"
FLIPPED = "kt = Transpose<perm=[0,1,2,4,3]>(k) s0 = MatMul(q, kt) "
SOFT = "p = Softmax<axis=-1>(s2) y = MatMul(p, v)"
SOFT_SHARED = "p = Softmax<axis=-1>(s2) y = MatMul(p, v1)"
LAST = "float[b,l,2,3,8] q, float[b,s,2,8] k, float[b,s,2,8] v"

FUSED = {
    "groups of heads": Spelling(
        SHARED + "s2 = Mul(s0, h) " + SOFT_SHARED, inputs=GROUPED, constants=f"{HALF}, {TWO}", output=GROUPED_OUT
    ),
    "groups of heads, masks and biases of every shape": Spelling(
        SHARED + "s1 = Add(s0, whole) s3 = Add(s1, head) s4 = Add(s3, group) s5 = Add(s4, low) s2 = Where(keep, s5, no) "
        "sh = Shape(s2) " + SOFT_SHARED,
        inputs=GROUPED + ", float[b,2,3,l,s] whole, float[2,1,1,1] head, float[1,1,3,1,s] group, float[l,s] low, "
        "bool[b,1,1,1,s] keep",
        constants=TWO + ", float no = {-3.0e38}",
        output=GROUPED_OUT + ", int64[5] sh",
    ),
    "groups of heads, a factor per head": Spelling(
        SHARED + "s2 = Mul(s0, f) " + SOFT_SHARED,
        inputs=GROUPED + ", float[2,3,1,1] f",
        constants=TWO,
        output=GROUPED_OUT,
    ),
    "groups of heads, einsum": Spelling(
        's2 = Einsum<equation="bkgqd,bksd->bkgqs">(q, k) p = Softmax<axis=-1>(s2) '
        'y = Einsum<equation="bkgqs,bksd->bkgqd">(p, v)',
        inputs=GROUPED,
        output=GROUPED_OUT,
    ),
    "groups of heads behind the length": Spelling(
        's2 = Einsum<equation="btkgh,bskh->bkgts">(q, k) p = Softmax<axis=-1>(s2) '
        'y = Einsum<equation="bkgts,bskh->btkgh">(p, v)',
        inputs=LAST,
        output="float[b,l,2,3,8] y",
    ),
    "queries before the groups of the scores": Spelling(
        's1 = Einsum<equation="btkgh,bskh->btkgs">(q, k) s2 = Where(keep, s1, no) sh = Shape(s2) p = Softmax<axis=-1>(s2) '
        'y = Einsum<equation="btkgs,bskh->btkgh">(p, v)',
        inputs=LAST + ", bool[b,l,1,1,s] keep",
        constants="float no = {-3.0e38}",
        output="float[b,l,2,3,8] y, int64[5] sh",
    ),
    "groups before the heads": Spelling(
        's1 = Einsum<equation="bghid,bhjd->bghij">(q, k) s2 = Add(s1, bias) sh = Shape(s2) p = Softmax<axis=-1>(s2) '
        'y = Einsum<equation="bghij,bhjd->bghid">(p, v)',
        inputs="float[b,3,2,l,8] q, float[b,2,s,8] k, float[b,2,s,8] v, float[3,2,l,s] bias",
        output="float[b,3,2,l,8] y, int64[5] sh",
    ),
    "groups of heads of an open number": Spelling(
        's2 = Einsum<equation="bkgqd,bksd->bkgqs">(q, k) p = Softmax<axis=-1>(s2) '
        'y = Einsum<equation="bkgqs,bksd->bkgqd">(p, v)',
        inputs="float[b,2,t,l,8] q, float[b,2,s,8] k, float[b,2,s,8] v",
        output="float[b,2,t,l,8] y",
    ),
    "one key head for all, without an axis": Spelling(
        's2 = Einsum<equation="bhid,bjd->bhij">(q, k) p = Softmax<axis=-1>(s2) y = Einsum<equation="bhij,bjd->bhid">(p, v)',
        inputs="float[b,4,l,8] q, float[b,s,8] k, float[b,s,8] v",
    ),
    "heads behind the queries": Spelling(
        's0 = Einsum<equation="btnh,bsnh->btns">(q, k) s2 = Add(s0, bias) sh = Shape(s2) p = Softmax<axis=-1>(s2) '
        'y = Einsum<equation="btns,bsnh->btnh">(p, v)',
        inputs="float[b,l,4,8] q, float[b,s,4,8] k, float[b,s,4,8] v, float[b,l,1,s] bias",
        output="float[b,l,4,8] y, int64[4] sh",
    ),
    "joined heads behind the queries": Spelling(
        's0 = Einsum<equation="tnh,snh->tns">(q, k) s2 = Add(s0, bias) p = Softmax<axis=-1>(s2) '
        'y = Einsum<equation="tns,snh->tnh">(p, v)',
        inputs="float[l,4,8] q, float[s,4,8] k, float[s,4,8] v, float[l,1,s] bias",
        output="float[l,4,8] y",
    ),
    "one batch, which the keys lack": Spelling(
        's2 = Einsum<equation="bhid,hjd->bhij">(q, k) p = Softmax<axis=-1>(s2) y = Einsum<equation="bhij,hjd->bhid">(p, v)',
        inputs="float[1,4,l,8] q, float[4,s,8] k, float[4,s,8] v",
        output="float[1,4,l,8] y",
    ),
    "windows": Spelling(FLIPPED + "s2 = Mul(s0, h) " + SOFT, inputs=WINDOWS, constants=HALF, output=WINDOWS_OUT),
    "windows, masks and biases of every shape": Spelling(
        FLIPPED + "s1 = Add(s0, moved) s3 = Add(s1, head) s4 = Where(keep, s3, no) s2 = Add(s4, row) sh = Shape(s2) " + SOFT,
        inputs=WINDOWS + ", float[1,t,1,l,s] moved, float[4,l,s] head, bool[b,1,1,1,s] keep, float[s] row",
        constants="float no = {-3.0e38}",
        output=WINDOWS_OUT + ", int64[5] sh",
    ),
    "windows in rows and columns": Spelling(
        'p0 = Einsum<equation="byxhid,byxhjd->byxhij">(q, k) p = Softmax<axis=-1>(p0) '
        'y = Einsum<equation="byxhij,byxhjd->byxihd">(p, v)',
        inputs="float[b,3,t,4,5,8] q, float[b,3,t,4,5,8] k, float[b,3,t,4,5,8] v",
        output="float[b,3,t,5,4,8] y",
    ),
    "windows that look at the same keys": Spelling(
        FLIPPED + "s2 = Add(s0, bias) " + SOFT,
        inputs="float[b,t,4,l,8] q, float[b,1,4,s,8] k, float[b,1,4,s,8] v, float[t,4,1,s] bias",
        output=WINDOWS_OUT,
    ),
    "windows of one head": Spelling(
        "kt = Transpose<perm=[0,1,3,2]>(k) s2 = MatMul(q, kt) " + SOFT,
        inputs="float[b,t,l,8] q, float[b,t,s,8] k, float[b,t,s,8] v",
        output="float[b,t,l,8] y",
    ),
    "groups of heads joined between the products": Spelling(
        SHARED + "s1 = Reshape(s0, four) s3 = Add(s1, bias) s4 = Mul(s3, h) s2 = Where(keep, s4, no) sh = Shape(s2) "
        "p0 = Softmax<axis=-1>(s2) p = Reshape(p0, five) y = MatMul(p, v1)",
        inputs=GROUPED.replace("l,", "5,").replace("s,", "7,") + ", float[6,5,7] bias, bool[b,1,1,7] keep",
        constants=f"{HALF}, {TWO}, float no = {{-3.0e38}}, int64[4] four = {{-1, 6, 5, 7}}, "
        "int64[5] five = {0, 2, 3, 5, 7}",
        output=GROUPED_OUT.replace("l,", "5,") + ", int64[4] sh",
    ),
    "groups of heads joined behind the queries": Spelling(
        's0 = Einsum<equation="btkgh,bskh->btkgs">(q, k) s1 = Reshape(s0, four) s2 = Where(keep, s1, no) '
        "p0 = Softmax<axis=-1>(s2) p = Reshape(p0, five) "
        'y = Einsum<equation="btkgs,bskh->btkgh">(p, v)',
        inputs=LAST.replace("b,l,", "b,5,").replace("b,s,", "b,7,") + ", bool[b,5,1,7] keep",
        constants="float no = {-3.0e38}, int64[4] four = {0, 5, 6, 7}, int64[5] five = {0, 0, 2, 3, 7}",
        output="float[b,5,2,3,8] y",
    ),
    "windows in the batch, masked each by itself": Spelling(
        "kt = Transpose<perm=[0,1,3,2]>(k) s0 = MatMul(q, kt) s1 = Add(s0, head) s3 = Reshape(s1, five) s4 = Add(s3, moved) "
        "sh = Shape(s4) s2 = Reshape(s4, four) " + SOFT,
        inputs="float[n,4,6,8] q, float[n,4,6,8] k, float[n,4,6,8] v, float[4,6,6] head, float[1,2,1,6,6] moved",
        constants="int64[5] five = {-1, 2, 4, 6, 6}, int64[4] four = {-1, 4, 6, 6}",
        output="float[n,4,6,8] y, int64[5] sh",
    ),
    "one query batch for all": Spelling(
        KT + "s0 = MatMul(q, kt) s2 = Add(s0, bias) " + SOFT,
        inputs="float[1,4,l,8] q, float[b,4,s,8] k, float[b,4,s,8] v" + BIAS,
    ),
    "one query head and batch of an einsum": Spelling(
        's2 = Einsum<equation="id,bhjd->bhij">(q, k) p = Softmax<axis=-1>(s2) y = Einsum<equation="bhij,bhjd->bhid">(p, v)',
        inputs="float[l,8] q, float[b,t,s,8] k, float[b,t,s,8] v",
        output="float[b,t,l,8] y",
    ),
    "keys for all batches and values of one head": Spelling(
        KT + "s2 = MatMul(q, kt) " + SOFT,
        inputs="float[b,4,l,8] q, float[1,4,s,8] k, float[b,1,s,8] v",
    ),
    "one head of queries and keys for many values": Spelling(
        KT + "s2 = MatMul(q, kt) " + SOFT,
        inputs="float[b,1,l,8] q, float[b,1,s,8] k, float[1,4,s,8] v",
    ),
    "joined heads, one bias for all": Spelling(
        "q1 = Reshape(q, join) k1 = Reshape(k, join) v1 = Reshape(v, join) kt = Transpose<perm=[0,2,1]>(k1) "
        "s0 = MatMul(q1, kt) s2 = Add(s0, bias) p = Softmax<axis=-1>(s2) o = MatMul(p, v1) y = Reshape(o, last)",
        inputs="float[b,4,6,8] q, float[b,4,6,8] k, float[b,4,6,8] v, float[1,6,6] bias",
        constants="int64[3] join = {-1, 6, 8}, int64[4] last = {-1, 4, 6, 8}",
        output="float[b,4,6,8] y",
    ),
    "a scale per head of joined heads": Spelling(
        "kt = Transpose<perm=[0,2,1]>(k) s0 = MatMul(q, kt) s2 = Mul(s0, t) " + SOFT,
        inputs=JOINED + ", float[n,1,1] t",
        output="float[n,l,8] y",
    ),
}

DECLINED = {
    "no batch": (
        Spelling(
            "kt = Transpose<perm=[1,0]>(k) s2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = MatMul(p, v)",
            inputs="float[l,8] q, float[s,8] k, float[s,8] v",
            output="float[l,8] y",
        ),
        "2 and 2 axes, which leaves no batch",
    ),
    "no batch in an einsum": (
        Spelling(
            's2 = Einsum<equation="id,jd->ij">(q, k) p = Softmax<axis=-1>(s2) y = Einsum<equation="ij,jd->id">(p, v)',
            inputs="float[l,8] q, float[s,8] k, float[s,8] v",
            output="float[l,8] y",
        ),
        "which leaves no batch",
    ),
    "an einsum that sums over an axis of the queries": (
        Spelling(
            's2 = Einsum<equation="bhid,bhj->bhij">(q, k) ' + SOFT,
            inputs="float[b,4,l,8] q, float[b,4,s] k, float[b,4,s,8] v",
        ),
        "no product of queries and keys",
    ),
    "an einsum that sums over an axis of the values": (
        Spelling(
            KT + 's2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = Einsum<equation="bhij,bhjdt->bhid">(p, v)',
            inputs="float[b,4,l,8] q, float[b,4,s,8] k, float[b,4,s,8,t] v",
        ),
        "no product with values",
    ),
    "an einsum that sums over the heads": (
        Spelling(
            KT + 's2 = MatMul(q, kt) p = Softmax<axis=-1>(s2) y = Einsum<equation="bhij,bhjd->bid">(p, v)',
            output="float[b,l,8] y",
        ),
        "no product with values",
    ),
    "groups before the heads, joined between the products": (
        Spelling(
            's0 = Einsum<equation="bghid,bhjd->bghij">(q, k) s1 = Reshape(s0, four) s2 = Add(s1, bias) '
            "p0 = Softmax<axis=-1>(s2) p = Reshape(p0, five) "
            'y = Einsum<equation="bghij,bhjd->bghid">(p, v)',
            inputs="float[b,3,2,5,8] q, float[b,2,7,8] k, float[b,2,7,8] v, float[6,5,7] bias",
            constants="int64[4] four = {0, 6, 5, 7}, int64[5] five = {0, 3, 2, 5, 7}",
            output="float[b,3,2,5,8] y",
        ),
        "not only to split batches or join heads",
    ),
    "queries along another axis at the second product": (
        Spelling(
            's2 = Einsum<equation="btkgh,bskh->btkgs">(q, k) p = Softmax<axis=-1>(s2) y = MatMul(p, v)',
            inputs="float[b,l,2,3,8] q, float[b,s,2,8] k, float[b,1,2,s,8] v",
            output="float[b,l,2,3,8] y",
        ),
        "along axis 1 of the scores and along axis 3",
    ),
    "one query batch for all windows": (
        Spelling(
            FLIPPED + "s2 = Mul(s0, h) " + SOFT,
            inputs=WINDOWS.replace("float[b,t,4,l,8] q", "float[1,t,4,l,8] q"),
            constants=HALF,
            output=WINDOWS_OUT,
        ),
        "have 1, any, any batches",
    ),
    "one query head for the key heads of windows": (
        Spelling(
            FLIPPED + "s2 = Mul(s0, h) " + SOFT,
            inputs=WINDOWS.replace("float[b,t,4,l,8] q", "float[b,t,1,l,8] q"),
            constants=HALF,
            output=WINDOWS_OUT,
        ),
        "have 1, 4, 4 heads",
    ),
    "windows opened again between the products": (
        Spelling(
            "kt = Transpose<perm=[0,1,2,4,3]>(k) s0 = MatMul(q, kt) s1 = Reshape(s0, six) s3 = Add(s1, bias) "
            "s2 = Reshape(s3, five) " + SOFT,
            inputs="float[b,6,4,5,8] q, float[b,6,4,7,8] k, float[b,6,4,7,8] v, float[1,1,3,1,5,7] bias",
            constants="int64[6] six = {-1, 2, 3, 4, 5, 7}, int64[5] five = {-1, 6, 4, 5, 7}",
            output="float[b,6,4,5,8] y",
        ),
        "not only to split batches or join heads",
    ),
    "windows of open numbers in the batch": (
        Spelling(
            "kt = Transpose<perm=[0,1,3,2]>(k) s0 = MatMul(q, kt) sh = Shape(moved) count = Slice(sh, i1, i2) "
            "five = Concat<axis=0>(minus, count, rest) s3 = Reshape(s0, five) s4 = Add(s3, moved) s2 = Reshape(s4, four) "
            + SOFT,
            inputs="float[n,4,6,8] q, float[n,4,6,8] k, float[n,4,6,8] v, float[1,t,1,6,6] moved",
            constants="int64[4] four = {-1, 4, 6, 6}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] minus = {-1}, "
            "int64[3] rest = {4, 6, 6}",
            output="float[n,4,6,8] y",
        ),
        "batches whose numbers the graph computes",
    ),
    "heads in rows of the queries": (
        Spelling(
            "kt = Transpose<perm=[0,2,1]>(k) sh = Shape(q) b0 = Slice(sh, i0, i1) l0 = Slice(sh, i1, i2) "
            "q1 = Reshape(q, rows) s0 = MatMul(q1, kt) full = Shape(s0) j0 = Slice(full, i2, i3) "
            "to = Concat<axis=0>(b0, l0, i4, j0) s1 = Reshape(s0, to) "
            "s2 = Where(keep, s1, no) p0 = Softmax<axis=-1>(s2) p = Reshape(p0, full) y = MatMul(p, v)",
            inputs="float[b,l,32] q, float[b,s,8] k, float[b,s,8] v, bool[b,l,1,s] keep",
            constants="int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i3 = {3}, int64[1] i4 = {4}, "
            "int64[3] rows = {0, -1, 8}, float no = {-3.0e38}",
            output="float[b,r,8] y",
        ),
        "rows of its queries (multi-query attention)",
    ),
    "heads of a number that is computed": (
        Spelling(
            "kt = Transpose<perm=[0,2,1]>(k) s0 = MatMul(q, kt) sh = Shape(bias) four = Concat<axis=0>(sh, five) "
            "s1 = Reshape(s0, four) s2 = Mul(s1, half) p0 = Softmax<axis=-1>(s2) p = Reshape(p0, three) y = MatMul(p, v)",
            inputs="float[6,5,8] q, float[6,7,8] k, float[6,7,8] v, float[b,t] bias",
            constants="int64[3] three = {6, 5, 7}, int64[2] five = {5, 7}, float half = {0.5}",
            output="float[6,5,8] y",
        ),
        "number of its heads is computed",
    ),
    "a mask of more batches over windows": (
        Spelling(
            FLIPPED + "s2 = Add(s0, bias) " + SOFT,
            inputs="float[1,3,4,l,8] q, float[1,3,4,s,8] k, float[1,3,4,s,8] v, float[b,1,1,1,s] bias",
            output="float[b,3,4,l,8] y",
        ),
        "1 of the b batches or heads",
    ),
}
