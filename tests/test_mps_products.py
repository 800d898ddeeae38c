"""MPSAttention and MPOLinear: kernel, op and fallback against the reference, plans against the estimate, what is refused."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from attention_backends import ONNX_TYPES
from cpu_sessions import cpu_session
from instruction_sets import ISAS, run_on
from mps_product_cases import CASES
from onnx import TensorProto, helper, numpy_helper

from qexport import _core
from qexport.errors import UsageError
from qexport.mps.cost import METHODS, attention_cost, linear_cost
from qexport.mps.layout import KINDS, Layout, make_layout
from qexport.mps.train import apply, decode, merge, unpack
from qexport.ops import DOMAIN, VERSION
from qexport.ops.mpo_linear_ref import mpo_linear_ref
from qexport.ops.mps_attention_ref import mps_attention_ref
from qexport.ops.proto import function_proto, make_node, register_schemas

ELEMENTS = ONNX_TYPES | {"float64": TensorProto.DOUBLE}
# Relative to the norm of the output: rounding of the sums, and where inputs and outputs are narrow, of the output.
ROUNDING = {"float64": 1e-14, "float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-7}
IDS = [case.name for case in CASES]


def typed(array, dtype):
    """The array rounded to a type that numpy knows by ml_dtypes if at all."""
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def relative(found, wanted):
    norm = np.linalg.norm(wanted.astype(np.float64))
    return np.linalg.norm(found.astype(np.float64) - wanted.astype(np.float64)) / (norm or 1.0)


def exact(reference, *arrays, **attributes):
    return reference(*(torch.from_numpy(array.astype(np.float64)) for array in arrays), **attributes).numpy()


def model(op, feeds, constants, dtype, attributes, opset=21, fallback=False):
    """A model of one node; inputs of narrow types come as float32 and are cast."""
    names = {**feeds, **constants}
    outer = dtype if dtype in ("float32", "float64") else "float32"
    node = make_node(op, [f"{name}_typed" for name in names], ["y_typed"], **attributes)
    casts = [helper.make_node("Cast", [name], [f"{name}_typed"], to=ELEMENTS[dtype]) for name in feeds]
    casts_back = [helper.make_node("Cast", ["y_typed"], ["y"], to=ELEMENTS[outer])]
    inputs = [helper.make_tensor_value_info(name, ELEMENTS[outer], value.shape) for name, value in feeds.items()]
    outputs = [helper.make_tensor_value_info("y", ELEMENTS[outer], None)]
    values = [numpy_helper.from_array(value, f"{name}_typed") for name, value in constants.items()]
    graph = helper.make_graph([*casts, node, *casts_back], "one_node", inputs, outputs, values)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [function_proto(op, opset)] if fallback else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def wide(feeds):
    return {name: x if x.dtype in (np.float32, np.float64) else x.astype(np.float32) for name, x in feeds.items()}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_attention_is_the_reference(case, method, dtype):
    cores, V = (typed(array, dtype) for array in case.attention())
    attributes = case.attributes() | {"method": method}
    want = exact(mps_attention_ref, cores, V, **attributes)
    feeds = {"cores": cores, "V": V}
    found = [_core.mps_attention(cores, V, **attributes, threads=threads) for threads in (1, 3)]
    found += cpu_session(model("MPSAttention", feeds, {}, dtype, attributes)).run(None, wide(feeds))
    assert (found[0] == found[1]).all()
    for y in found:
        assert y.shape == want.shape
        assert relative(y, want) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_linear_is_the_reference(case, method, dtype):
    """With cores that come with the call, and with cores of the model, which are prepared once."""
    x, cores, bias = (typed(array, dtype) for array in case.linear())
    attributes = case.attributes() | {"method": method}
    want = exact(mpo_linear_ref, x, cores, bias, **attributes)
    found = [_core.mpo_linear(x, cores, bias, **attributes, threads=threads) for threads in (1, 3)]
    feeds = {"x": x, "cores": cores, "bias": bias}
    found += cpu_session(model("MPOLinear", feeds, {}, dtype, attributes)).run(None, wide(feeds))
    constant = cpu_session(model("MPOLinear", {"x": x}, {"cores": cores, "bias": bias}, dtype, attributes))
    found += [constant.run(None, wide({"x": x}))[0] for _ in range(2)]
    assert (found[0] == found[1]).all()
    for y in found:
        assert y.shape == want.shape
        assert relative(y, want) <= ROUNDING[dtype]
    without = _core.mpo_linear(x, cores, **attributes)
    assert relative(without, exact(mpo_linear_ref, x, cores, **attributes)) <= ROUNDING[dtype]


@pytest.mark.parametrize("opset", range(17, 25))
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_runs_with_and_without_the_library(opset, with_bias):
    """The two agree to 1e-5, as a layer of a model whose cores are an initializer, and as one whose cores are an input."""
    for case in CASES:
        x, cores, bias = (array.astype(np.float32) for array in case.linear())
        constants = {"cores": cores, **({"bias": bias} if with_bias else {})}
        for feeds, fixed in (({"x": x}, constants), ({"x": x, **constants}, {})):
            proto = model("MPOLinear", feeds, fixed, "float32", case.attributes(), opset, fallback=True)
            ours, standard = (cpu_session(proto, library=library).run(None, feeds)[0] for library in (True, False))
            assert ours.shape == standard.shape
            assert relative(ours, standard) <= 1e-5


@pytest.mark.parametrize("opset", [17, 21, 24])
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "no_values"], ids=lambda case: case.name)
def test_attention_runs_with_and_without_the_library(case, opset):
    """But for an empty batch, which onnxruntime's MatMul does not broadcast."""
    cores, V = (array.astype(np.float32) for array in case.attention())
    feeds = {"cores": cores, "V": V}
    proto = model("MPSAttention", feeds, {}, "float32", case.attributes(), opset, fallback=True)
    ours, standard = (cpu_session(proto, library=library).run(None, feeds)[0] for library in (True, False))
    assert ours.shape == standard.shape
    assert relative(ours, standard) <= 1e-5


def test_constant_cores_serve_any_number_of_tokens():
    """Each class of sizes may be grouped in its own way; threads of one session may ask for them at once."""
    from concurrent.futures import ThreadPoolExecutor

    case = next(c for c in CASES if c.name == "large")
    _, cores, bias = (array.astype(np.float32) for array in case.linear())
    attributes = case.attributes()
    proto = model(
        "MPOLinear", {"x": np.ones((1, case.rows), np.float32)}, {"cores": cores, "bias": bias}, "float32", attributes
    )
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "tokens"
    shared = cpu_session(proto)
    inputs = [np.random.default_rng(n).standard_normal((n, case.rows)).astype(np.float32) for n in (1, 2, 3, 5, 8, 65)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda x: shared.run(None, {"x": x})[0], inputs * 3))
    for x, y in zip(inputs * 3, outputs, strict=True):
        assert relative(y, exact(mpo_linear_ref, x, cores, bias, **attributes)) <= ROUNDING["float32"]


def layouts():
    for kind, (rows, cols) in itertools.product(KINDS, [(1, 1), (7, 30), (64, 64), (250, 96), (1024, 4096)]):
        yield make_layout(kind, rows, cols)
    yield Layout(3, 40, (3,), (40,))
    yield Layout(40, 2, (1, 1, 40), (1, 2, 1))


@pytest.mark.parametrize("method", METHODS)
def test_kernels_plan_what_is_estimated(method):
    """The same groups, and the same nanoseconds up to the order of the sums."""
    plans = set()
    for layout, bond_dim, size in itertools.product(layouts(), (1, 3, 8, 33), (1, 5, 64, 700)):
        bonds = layout.bonds(bond_dim)
        train = (layout.rows, layout.cols, layout.row_factors, layout.col_factors, bonds)
        pairs = [
            (_core.mps_attention_plan(*train, 3, size, method), attention_cost(layout, bonds, size, 3, method)),
            (_core.mpo_linear_plan(*train, size, True, method), linear_cost(layout, bonds, size, True, method)),
            (_core.mpo_linear_plan(*train, size, False, method), linear_cost(layout, bonds, size, False, method)),
        ]
        for (ends, nanoseconds), cost in pairs:
            assert ends == list(itertools.accumulate(cost.groups))
            assert nanoseconds == pytest.approx(cost.dense if cost.method == "dense" else cost.factored, rel=1e-12)
            assert cost.reason.startswith(f"{cost.method}: ")
            plans.add(cost.groups)
    assert len(plans) > (10 if method != "dense" else 3)


def test_estimates_choose_the_way():
    """Few bonds: through the cores; many: through the matrix, from some bond dimension on; a matrix that is kept is taken
    from fewer on."""
    square = make_layout("interleaved", 1024, 1024)
    for cost in (attention_cost, linear_cost):
        methods = [cost(square, square.bonds(b), 64).method for b in range(1, 40)]
        flips = [b for b, method in enumerate(methods, 1) if method == "dense"]
        assert flips == list(range(flips[0], 40))
        assert flips[0] > 8
    kept, made = (linear_cost(square, square.bonds(16), 64, constant) for constant in (True, False))
    assert (kept.dense < made.dense, kept.method, made.method) == (True, "dense", "factored")
    with pytest.raises(UsageError, match="method must be one of auto, factored, dense, got 'fast'"):
        attention_cost(square, square.bonds(4), 64, method="fast")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_merged_trains_are_the_same_matrix(case):
    cores = torch.from_numpy(case.cores())
    layout = make_layout(case.kind, case.rows, case.cols)
    train = unpack(cores, layout, layout.bonds(case.bond_dim))
    sites = len(train)
    V = torch.from_numpy(np.random.default_rng(0).standard_normal((case.cols, 3)))
    for groups in {(sites,), (1,) * sites, (1, sites - 1) if sites > 1 else (1,), ((sites + 1) // 2, sites // 2)}:
        if min(groups) == 0:
            continue
        merged, coarse = merge(train, layout, groups)
        assert len(merged) == len(groups)
        assert relative(decode(merged, coarse).numpy(), decode(train, layout).numpy()) <= 1e-13
        assert relative(apply(merged, coarse, V).numpy(), apply(train, layout, V).numpy()) <= 1e-13
    with pytest.raises(UsageError, match="groups must be >= 1 and sum to"):
        merge(train, layout, (sites, 1))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = """
import numpy as np
from mps_product_cases import CASES
from test_mps_products import ROUNDING, exact, mpo_linear_ref, mps_attention_ref, relative, typed
from qexport import _core
for case in CASES:
    for dtype in ROUNDING:
        for method in ("factored", "dense"):
            a = case.attributes() | {"method": method}
            inputs = [typed(x, dtype) for x in case.attention()]
            error = relative(_core.mps_attention(*inputs, **a), exact(mps_attention_ref, *inputs, **a))
            assert error <= ROUNDING[dtype], (case, dtype, method, error)
            inputs = [typed(x, dtype) for x in case.linear()]
            error = relative(_core.mpo_linear(*inputs, **a), exact(mpo_linear_ref, *inputs, **a))
            assert error <= ROUNDING[dtype], (case, dtype, method, error)
print(_core.isa())
"""
    assert run_on(isa, code).strip() == isa


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_schemas_and_library_infer_the_shapes(case):
    register_schemas()
    attributes = case.attributes()
    cores, V = (array.astype(np.float32) for array in case.attention())
    x, core, bias = (array.astype(np.float32) for array in case.linear())
    for op, feeds in (("MPSAttention", {"cores": cores, "V": V}), ("MPOLinear", {"x": x, "cores": core, "bias": bias})):
        proto = model(op, feeds, {}, "float32", attributes)
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        shape = cpu_session(proto).run(None, feeds)[0].shape
        assert tuple(d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim) == shape
        assert tuple(cpu_session(proto).get_outputs()[0].shape) == shape


WRONG = [
    ({"rows": 9}, "rows must be|row_factors must be"),
    ({"bonds": [1, 2, 2]}, "bonds must be 4 numbers"),
    ({"method": "fast"}, "method must be"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_attributes(change, message):
    """The same limits in the binding and in the op table."""
    train = {"rows": 8, "cols": 8, "row_factors": [2, 2, 2], "col_factors": [2, 2, 2], "bonds": [1, 2, 2, 1]}
    attributes = train | {"method": "auto"} | change
    with pytest.raises(ValueError, match=rf"\[MPSAttention\] ({message})"):
        _core.mps_attention(np.ones(32), np.ones((8, 2)), **attributes)
    with pytest.raises(ValueError, match=rf"\[MPOLinear\] ({message})"):
        _core.mpo_linear(np.ones(8), np.ones(32), **attributes)
    for op in ("MPSAttention", "MPOLinear"):
        with pytest.raises(UsageError, match=rf"\[{op}\] ({message})"):
            make_node(op, ["a", "b"], ["y"], **attributes)


def test_wrong_inputs():
    train = {"rows": 8, "cols": 4, "row_factors": [2, 2, 2], "col_factors": [1, 2, 2], "bonds": [1, 2, 2, 1]}
    attributes = train | {"method": "auto"}
    cores = np.ones(28)
    for wrong, message in [
        ((np.ones(27), np.ones((4, 2))), r"cores must hold 28 numbers on the last axis, got shape \(27\)|\(27,\)"),
        ((cores, np.ones((8, 2))), r"V must be \(\.\.\., 4, features\), got shape \(8, 2\)"),
        ((cores, np.ones(4)), "V must be"),
        ((np.ones((3, 28)), np.ones((2, 4, 2))), "cores must have one axis, or the leading axes of V"),
        ((cores, np.ones((4, 2), np.float32)), "V must have the type of cores"),
        ((np.ones(28, bool), np.ones((4, 2))), "cores must be float32, float16, bfloat16 or float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.mps_attention(*wrong, **attributes)
    for wrong, message in [
        ((np.ones(4), cores), r"x must be \(\.\.\., 8\)"),
        ((np.ones(8), np.ones((2, 28))), "cores must have one axis"),
        ((np.ones(8), cores, np.ones(8)), r"bias must be \(4\)"),
        ((np.ones(8), cores, np.ones(4, np.float32)), "bias must have the type of cores"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.mpo_linear(*wrong, **attributes)
    feeds = {"cores": cores.astype(np.float32), "V": np.ones((8, 2), np.float32)}
    in_session = cpu_session(model("MPSAttention", feeds, {}, "float32", attributes))
    with pytest.raises(Exception, match="V must be"):
        in_session.run(None, feeds)
