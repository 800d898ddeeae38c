"""Any chain of scales, biases, masks and no-ops, and axes in any order, are fused and compute the same."""

from harness import Rewritten, assert_same, feeds, parse, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# step: (nodes with {a} -> {b}, the input it needs)
STEPS = {
    "scale": ("{b} = Mul({a}, c{i})", None),
    "divide": ("{b} = Div({a}, c{i})", None),
    "bias": ("{b} = Add({a}, bias{i})", "float[b,1,1,s] bias{i}"),
    "bias before": ("{b} = Add(bias{i}, {a})", "float[4,l,s] bias{i}"),
    "subtract": ("{b} = Sub({a}, bias{i})", "float[1,4,l,s] bias{i}"),
    "row": ("{b} = Add({a}, bias{i})", "float[s] bias{i}"),
    "keep": ("{b} = Where(keep{i}, {a}, low)", "bool[b,1,l,s] keep{i}"),
    "drop": ("n{i} = Not(keep{i}) {b} = Where(n{i}, low, {a})", "bool[1,1,l,s] keep{i}"),
    "identity": ("{b} = Identity({a})", None),
    "cast": ("{b} = Cast<to=1>({a})", None),
    "floor": ("{b} = Max({a}, low)", None),
    "dropout": ("{b}, drop{i} = Dropout({a})", None),
}
KEYS = ("kt = Transpose<perm=[0,1,3,2]>(k)", "k0 = Mul(k, half) kt = Transpose<perm=[0,1,3,2]>(k0)")
QUERIES = ("q1 = Identity(q)", "q1 = Mul(q, half)", "q1 = Div(q, half)")


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.floats(0.2, 3.0)), max_size=6),
    keys=st.sampled_from(KEYS),
    queries=st.sampled_from(QUERIES),
    opset=st.sampled_from([17, 23]),
)
def test_any_chain_is_fused_and_equal(steps, keys, queries, opset):
    nodes, inputs, constants = [keys, queries, "t0 = MatMul(q1, kt)"], [], ["float low = {-3.0e38}", "float half = {0.5}"]
    for i, (step, number) in enumerate(steps):
        text, needs = STEPS[step]
        nodes.append(text.format(a=f"t{i}", b=f"t{i + 1}", i=i))
        constants.append(f"float c{i} = {{{number}}}")
        inputs += [needs.format(i=i)] if needs else []
    nodes.append(f"p = Softmax<axis=-1>(t{len(steps)}) y = MatMul(p, v)")
    given_inputs = ", ".join(["float[b,4,l,8] q, float[b,4,s,8] k, float[b,4,s,8] v", *inputs])
    source = parse(
        f'<ir_version: 8, opset_import: ["": 17]> g ({given_inputs}) => (float[b,4,l,8] y) <{", ".join(constants)}> '
        f"{{ {' '.join(nodes)} }}"
    )
    values = feeds(source)
    done = Rewritten(source, opset=opset)
    assert done.left_alone == []
    assert len(done.sites) == 1
    assert_same(run(source, values), run(done.sampled, values))


# letter: its size, a name where it is open; g is an axis of the queries alone
AXES = {"b": "b", "w": "t", "h": "4", "g": "2", "i": "l", "j": "s", "d": "8"}


def declared(name, letters, ones=()):
    sizes = ",".join("1" if letter in ones else AXES[letter] for letter in letters)
    return f"float[{sizes}] {name}"


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(["bh", "bhg", "bwh", "bwhg"]), opset=st.sampled_from([17, 23]))
def test_axes_in_any_order_are_fused_and_equal(data, kind, opset):
    order = st.permutations
    scores = [*data.draw(order([*kind, "i"])), "j"]
    query, keys = data.draw(order([*kind, "i", "d"])), data.draw(order([*kind.replace("g", ""), "j", "d"]))
    values, out = data.draw(order([*kind.replace("g", ""), "j", "d"])), data.draw(order([*kind, "i", "d"]))
    ones = data.draw(st.lists(st.sets(st.sampled_from([*kind, "i"])), max_size=2))
    inputs = [declared("q", query), declared("k", keys), declared("v", values)]
    inputs += [declared(f"bias{n}", scores, some) for n, some in enumerate(ones)]
    s, q, k, v, o = ("".join(letters) for letters in (scores, query, keys, values, out))
    nodes = [f't0 = Einsum<equation="{q},{k}->{s}">(q, k)']
    nodes += [f"t{n + 1} = Add(t{n}, bias{n})" for n in range(len(ones))]
    nodes += [f'p = Softmax<axis=-1>(t{len(ones)}) y = Einsum<equation="{s},{v}->{o}">(p, v)']
    source = parse(
        f'<ir_version: 8, opset_import: ["": 17]> g ({", ".join(inputs)}) => ({declared("y", out)}) {{ {" ".join(nodes)} }}'
    )
    inputs = feeds(source)
    done = Rewritten(source, opset=opset)
    shared_first = next(letter for letter in scores if letter != "i") == "g"  # keys that all batches share
    assert [entry.reason for entry in done.left_alone if "batches" not in entry.reason or not shared_first] == []
    expected = run(source, inputs)
    for library in (False, True):
        assert_same(expected, run(done.sampled, inputs, library))
