"""Which weights of a graph are found, and that each form written into it computes what the dense replacement does."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from compression_cases import correlated, model_of, random, run, with_weight

from qexport.compression import decoding, nodes
from qexport.compression.forms import HALF, INTEGER, KEEP, LOW_RANK, NODE, TRELLIS, Method, Seen, methods, nbytes
from qexport.compression.layers import find_layers
from qexport.rewrite.graph import is_op

ROWS, COLUMNS = 96, 64
WEIGHT = {"w": random(ROWS, COLUMNS)}
TURNED = {"w": random(COLUMNS, ROWS, seed=1)}
SQUARE = {"w": random(64, 64, seed=2)}


def text(body, inputs=f"float[n,{ROWS}] x", opset=23, out="float[n,m] y") -> str:
    return f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({out}) {{ {body} }}'


IDS = "int64[n,k] i"
EXPERTS = {"w": random(64, 4, 64, seed=6)}
# name -> (text, weights, kinds of `w`, whether the initializer holds W^T)
FOUND = {
    "MatMul": (text("y = MatMul(x, w)"), WEIGHT, ("linear",), False),
    "Transpose": (text("t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)"), TURNED, ("linear",), True),
    "Transpose without perm": (text("t = Transpose(w) y = MatMul(x, t)"), TURNED, ("linear",), True),
    "Identity": (text("v = Identity(w) y = MatMul(x, v)"), WEIGHT, ("linear",), False),
    "Identity and Transpose": (text("v = Identity(w) t = Transpose(v) y = MatMul(x, t)"), TURNED, ("linear",), True),
    "Gemm": (text("y = Gemm(x, w, b)"), WEIGHT | {"b": random(COLUMNS)}, ("linear",), False),
    "Gemm without C": (text("y = Gemm(x, w)"), WEIGHT, ("linear",), False),
    "Gemm transB": (text("y = Gemm<transB=1>(x, w, b)"), TURNED | {"b": random(COLUMNS)}, ("linear",), True),
    "Gemm transB of a Transpose": (text("t = Transpose(w) y = Gemm<transB=1>(x, t)"), WEIGHT, ("linear",), False),
    "two products": (text("a = MatMul(x, w) b = Neg(a) c = MatMul(x, w) y = Max(b, c)"), WEIGHT, ("linear",), False),
    "Gather": (text("y = Gather(w, i)", IDS, out="float[n,k,m] y"), WEIGHT, ("table",), False),
    "Gather of a square table": (text("y = Gather(w, i)", IDS, out="float[n,k,m] y"), SQUARE, ("table",), False),
    "tied": (
        text("h = Gather(w, i) t = Transpose<perm=[1,0]>(w) y = MatMul(h, t)", IDS, out="float[n,k,m] y"),
        WEIGHT,
        ("linear", "table"),
        True,
    ),
    "tied through an Identity": (
        text("h = Gather(w, i) v = Identity(w) y = Gemm<transB=1>(h, v)", "int64[n] i"), WEIGHT, ("linear", "table"), True
    ),
    "tied, the head first": (
        text("t = Transpose<perm=[1,0]>(w) a = MatMul(x, t) h = Gather(w, i) s = ReduceSum<keepdims=0>(h) y = Add(a, s)",
             f"float[n,{COLUMNS}] x, {IDS}"),
        WEIGHT,
        ("linear", "table"),
        True,
    ),
    "experts": (text("y = Gather(w, i)", IDS, out="float[n,k,p,m] y"), EXPERTS, ("experts",), False),
    "experts of a branch": (
        text("""k = Constant<value_int=7>() f = Gather(w, k) z = MatMul(x, f) s = Size(x) c = Equal(s, k)
             y = If(c) <then_branch = t () => (float[n,m] a) { a = Neg(z) },
                       else_branch = e () => (float[n,m] b) {
                           o = Constant<value_int=3>() g = Gather(w, o) b = MatMul(x, g)
                       }>""", "float[n,4] x"),
        EXPERTS,
        ("experts",),
        False,
    ),
}  # fmt: skip
IF = """y = If(c) <then_branch = t () => (float[n,m] a) { a = MatMul(x, w) },
                  else_branch = e () => (float[n,m] b) { b = Neg(z) }>"""
DECLINED = {
    "on the left": (text("y = MatMul(w, x)", f"float[{COLUMNS},n] x"), WEIGHT),
    "alpha": (text("y = Gemm<alpha=0.5>(x, w)"), WEIGHT),
    "beta": (text("y = Gemm<beta=2.0>(x, w, b)"), WEIGHT | {"b": random(COLUMNS)}),
    "transA": (text("y = Gemm<transA=1>(x, w)", f"float[{ROWS},n] x"), WEIGHT),
    "an output of the graph": (text("y = MatMul(x, w)", out=f"float[n,m] y, float[{ROWS},{COLUMNS}] w"), WEIGHT),
    "an input of the graph": (text("y = MatMul(x, w)", f"float[n,{ROWS}] x, float[{ROWS},{COLUMNS}] w"), WEIGHT),
    "transposed twice": (text("t = Transpose(w) v = Transpose(t) y = MatMul(x, v)"), WEIGHT),
    "its Identity is an output": (
        text("v = Identity(w) y = MatMul(x, v)", out=f"float[n,m] y, float[{ROWS},{COLUMNS}] v"),
        WEIGHT,
    ),
    "its Transpose is an output": (
        text("t = Transpose(w) y = MatMul(x, t)", out=f"float[n,m] y, float[{ROWS},{COLUMNS}] t"),
        TURNED,
    ),
    "another use": (text("a = MatMul(x, w) s = ReduceSum<keepdims=0>(w) y = Add(a, s)"), WEIGHT),
    "both ways": (text("a = MatMul(x, w) t = Transpose(w) y = MatMul(a, t)"), WEIGHT),
    "a table and the right side": (text("h = Gather(w, i) y = MatMul(h, w)", IDS, out="float[n,k,m] y"), SQUARE),
    "columns are picked": (text("y = Gather<axis=1>(w, i)", "int64[m] i", out="float[n,m] y"), WEIGHT),
    "a subgraph": (text(f"z = MatMul(x, w) {IF}", f"float[n,{ROWS}] x, bool c"), WEIGHT),
    "small": (text("y = MatMul(x, w)", "float[n,8] x"), {"w": random(8, 8)}),
    "three axes": (text("y = MatMul(x, w)", f"float[n,2,{ROWS}] x", out="float[n,2,m] y"), {"w": random(2, ROWS, COLUMNS)}),
    "experts that something else reads": (
        text("a = Gather(w, i) s = ReduceSum<keepdims=0>(w) y = Add(a, s)", IDS, out="float[n,k,p,m] y"),
        EXPERTS,
    ),
    "doubles": (text("y = MatMul(x, w)", "double[n,64] x", out="double[n,m] y"), {"w": random(64, 64, dtype=np.float64)}),
    "integers": (text("y = MatMul(x, w)", "int32[n,64] x", out="int32[n,m] y"), {"w": np.ones((64, 64), np.int32)}),
}  # fmt: skip


def feed_of(model) -> dict:
    """Inputs with correlated entries, as the weights' inputs have them."""
    feed = {}
    for value in model.graph.input:
        shape = [5 if not dim.dim_value else dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name == "i":
            feed["i"] = np.random.default_rng(3).integers(0, 64, shape)
        else:
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feed[value.name] = correlated(int(np.prod(shape[:-1])), shape[-1]).reshape(shape).astype(kind)
    return feed


def seen_of(layer) -> Seen:
    """The layer with what its inputs look like, here the same for all."""
    rows = layer.matrix().shape[0]
    if not layer.products:
        return Seen(layer, np.arange(1.0, layer.flat_shape[0] + 1))
    X = correlated(300, rows).astype(np.float64)
    return Seen(layer, X.T @ X)


def stored(model, form_of, level: int = 0) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """(the model with `w` in the form that form_of(seen) gives, the one with the same numbers spelled out)."""
    graph = ir.from_proto(model)
    layer = next(layer for layer in find_layers(graph) if layer.name == "w")
    form = form_of(seen_of(layer))
    nodes.store(graph, layer, form, level)
    return ir.to_proto(graph), with_weight(model, "w", layer.as_stored(form.dense()))


@pytest.mark.parametrize("case", FOUND)
def test_a_weight_is_found(case):
    source, weights, kinds, transposed = FOUND[case]
    layers = {layer.name: layer for layer in find_layers(ir.from_proto(model_of(source, weights)))}
    assert (layers["w"].kinds, layers["w"].transposed) == (kinds, transposed)
    assert layers["w"].shape == weights["w"].shape
    np.testing.assert_array_equal(layers["w"].as_stored(layers["w"].matrix()), weights["w"])


def test_a_branch_keeps_its_own_weights():
    graph = ir.from_proto(model_of(*FOUND["experts of a branch"][:2]))
    (branch,) = {use.node.graph for use in graph.graph.initializers["w"].uses()} - {graph.graph}
    own = ir.Value(name="own", shape=ir.Shape([64, 4, 64]), const_value=ir.tensor(EXPERTS["w"], name="own"))
    branch.register_initializer(own)
    next(node for node in branch if node.op_type == "Gather").replace_input_with(0, own)
    assert [layer.name for layer in find_layers(graph)] == ["w"]


@pytest.mark.parametrize("case", DECLINED)
def test_a_weight_is_left_alone(case):
    source, weights = DECLINED[case]
    model = model_of(source, weights)
    onnx.checker.check_model(model)
    assert "w" not in [layer.name for layer in find_layers(ir.from_proto(model))]


ALL = ("fp16", "int8", "trellis", "int4", "low-rank")
METHODS = [
    Method(HALF),
    Method(INTEGER, 8, 32),
    Method(INTEGER, 4, 32),
    Method(INTEGER, 4, 64),
    Method(LOW_RANK, 8, 32, 32),
    Method(LOW_RANK, 4, 32, 32),
    Method(TRELLIS, rate=2.5),
    Method(TRELLIS, rate=4.0),
]


@pytest.mark.parametrize("case", [case for case in FOUND if case.startswith("tied")])
def test_a_weight_that_is_a_table_and_a_product_has_no_factors(case):
    (layer,) = find_layers(ir.from_proto(model_of(*FOUND[case][:2])))
    assert {found.kind for found in methods(layer, ALL)} == {KEEP, HALF, INTEGER, TRELLIS}


def test_experts_have_codes():
    (layer,) = find_layers(ir.from_proto(model_of(*FOUND["experts"][:2])))
    found = methods(layer, ALL)
    assert {method.kind for method in found} == {KEEP, HALF, INTEGER}
    for method in found[1:]:
        assert nbytes(layer, method) - NODE == seen_of(layer).make(method).nbytes


def fits(case, method) -> bool:
    """Whether a method is one for the weight of a case."""
    kinds = FOUND[case][2]
    return method.kind in (HALF, INTEGER) or (kinds != ("experts",) and (len(kinds) == 1 or method.kind != LOW_RANK))


@pytest.mark.parametrize(
    ("case", "method"), [(case, method) for case in FOUND for method in METHODS if fits(case, method)], ids=str
)
def test_a_form_computes_what_its_dense_weight_does(case, method):
    source, weights, *_ = FOUND[case]
    model = model_of(source, weights)
    written, dense = stored(model, lambda seen: seen.make(method))
    onnx.checker.check_model(written)
    feed = feed_of(model)
    expected, found = run(dense, feed), run(written, feed)
    # float32 sums of at most 96 numbers in another order
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=96 * 6e-8 * np.abs(expected).max())
    names = {tensor.name for tensor in written.graph.initializer}
    assert "w" not in names
    ways = [node for node in written.graph.node if node.op_type in ("Identity", "Transpose")]
    assert not ways or method.kind in (HALF, TRELLIS)
    assert np.abs(expected - run(model, feed)).max() > 1e-6  # the weight did change


def test_tables_beside_products_beside_products():
    """Each weight is written into a graph that those before it changed: the input of a product is what replaced a table."""
    source = text("h = Gather(w, i) a = MatMul(h, v) y = MatMul(a, u)", IDS, out="float[n,k,m] y")
    model = model_of(source, WEIGHT | {"v": random(64, 96, seed=4), "u": random(96, 64, seed=5)})
    graph, dense = ir.from_proto(model), model
    for layer in find_layers(graph):
        form = seen_of(layer).make(Method(INTEGER, 8, 32))
        nodes.store(graph, layer, form, 0)
        dense = with_weight(dense, layer.name, layer.as_stored(form.dense()))
    feed = feed_of(model)
    expected = run(dense, feed)
    np.testing.assert_allclose(run(ir.to_proto(graph), feed), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("opset", range(17, 25))
def test_every_opset(opset):
    source = text("h = Gather(w, i) t = Transpose<perm=[1,0]>(w) y = MatMul(h, t)", IDS, opset, "float[n,k,m] y")
    model = model_of(source, WEIGHT)
    feed = feed_of(model)
    for method in (Method(HALF), Method(INTEGER, 4, 32), Method(TRELLIS, rate=3.5)):
        written, dense = stored(model, lambda seen, method=method: seen.make(method))
        expected = run(dense, feed)
        np.testing.assert_allclose(run(written, feed), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, Method(INTEGER, bits, 32)) for case in ("MatMul", "Gemm", "Gather", "tied") for bits in (8, 4)),
        *((case, Method(LOW_RANK, 8, 32, 32)) for case in ("MatMul", "Gather")),
        *((case, Method(TRELLIS, rate=3.5)) for case in ("MatMul", "Gemm", "Gather", "tied")),
    ],
    ids=str,
)
def test_models_of_float16(case, method):
    source, weights, *_ = FOUND[case]
    halves = {name: array.astype(np.float16) for name, array in weights.items()}
    model = model_of(source.replace("float[", "float16["), halves)
    written, dense = stored(model, lambda seen: seen.make(method))
    feed = feed_of(model)
    expected, found = (run(m, feed).astype(np.float32) for m in (dense, written))
    assert found.dtype == expected.dtype
    # each step rounds to 2^-11 of itself: the weight, sums and the product of factors
    assert np.abs(found - expected).max() <= 8 * 2**-11 * np.abs(expected).max()
    layer = find_layers(ir.from_proto(model))[0]
    assert Method(HALF) not in methods(layer, ("fp16",))  # it is that already


@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_whole_numbers_round_their_inputs_to_8_bits(bits):
    """The level that files are written with: each block of an input is rounded to 1/127 of its largest number."""
    model = model_of(*FOUND["MatMul"][:2])
    written, dense = stored(model, lambda seen: seen.make(Method(INTEGER, bits, 32)), nodes.ACCURACY_LEVEL)
    feed = feed_of(model)
    W = onnx.numpy_helper.to_array(dense.graph.initializer[0])
    steps = np.repeat(np.abs(feed["x"].reshape(5, -1, 32)).max(-1), 32, axis=-1) / 127
    allowed = steps @ np.abs(W) / 2 * 1.01
    error = np.abs(run(written, feed) - run(dense, feed))
    assert (error <= allowed).all()
    assert error.max() > 1e-4 * np.abs(run(dense, feed)).max()  # they are rounded


@pytest.mark.parametrize("case", ["MatMul", "Gather", "tied", "Gemm transB"])
def test_what_a_method_takes_is_what_the_file_grows_by(case):
    """nbytes counts what is stored, and a constant for nodes and names; what all strings share is not counted."""
    source, weights, *_ = FOUND[case]
    model = model_of(source, weights)
    layer = next(layer for layer in find_layers(ir.from_proto(model)) if layer.name == "w")
    for method in methods(layer, ALL)[1:]:
        written, _ = stored(model, lambda seen, method=method: seen.make(method))
        arrays = sum(len(t.raw_data) for t in written.graph.initializer if t.name.startswith("w/"))
        assert 0 <= nbytes(layer, method) - arrays <= 2000
        shared = [*written.functions, *(t for t in written.graph.initializer if t.name.startswith(decoding.DOMAIN))]
        grown = written.ByteSize() - sum(part.ByteSize() for part in shared) - (model.ByteSize() - layer.nbytes)
        assert abs(grown - nbytes(layer, method)) <= 1200


def test_a_cast_comes_before_its_first_use():
    source = text("a = MatMul(x, w) b = Neg(x) c = MatMul(b, w) y = Add(a, c)")
    graph = ir.from_proto(model_of(source, WEIGHT))
    first, second = (node for node in graph.graph if is_op(node, "MatMul"))
    for node in (first, second):  # a rewrite took the weight away and gave it back: uses are in another order
        node.replace_input_with(1, None)
    for node in (second, first):
        node.replace_input_with(1, graph.graph.initializers["w"])
    (layer,) = find_layers(graph)
    nodes.store(graph, layer, seen_of(layer).make(Method(HALF)))
    onnx.checker.check_model(ir.to_proto(graph))
