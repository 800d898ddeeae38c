"""Any chain of scales, biases, masks and no-ops between the products is fused, and computes the same."""

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
