"""MPSEncode and MPSDecode: kernel, op and fallback against the reference, and what is refused."""

import numpy as np
import onnx
import pytest
import torch
from attention_backends import ONNX_TYPES
from cpu_sessions import cpu_session
from onnx import TensorProto, helper

from qexport import _core
from qexport.errors import UsageError
from qexport.mps.layout import KINDS, make_layout
from qexport.ops import DOMAIN, VERSION
from qexport.ops.mps_decode_ref import mps_decode_ref
from qexport.ops.mps_encode_ref import mps_encode_ref
from qexport.ops.proto import function_proto, make_node, register_schemas

ELEMENTS = {"float32": ONNX_TYPES["float32"], "float64": TensorProto.DOUBLE}
# What rounding leaves of a relative error: entries and cores in the type, and the Gram matrix in float64, whose eigenvalues
# are known to 1e-14 of the largest.
ROUNDING = {"float32": 1e-6, "float64": 1e-7}
# (batch and size, bond_dim)
SHAPES = [
    ((1, 1), 4),
    ((7, 1), 2),
    ((8, 8), 3),
    ((2, 30, 90), 12),
    ((2, 3, 20, 11), 5),
    ((61, 64), 32),
    ((61, 53), 9),
    ((128, 128), 16),
]


def matrix(shape, seed=0, rank=None):
    rng = np.random.default_rng(seed)
    if rank is None:
        place = np.arange(max(shape[-2:]))
        near = np.exp(-((place[:, None] - place) ** 2) / 50)[: shape[-2], : shape[-1]]
        return near + 0.01 * rng.standard_normal(shape)
    return rng.standard_normal((*shape[:-1], rank)) @ rng.standard_normal((*shape[:-2], rank, shape[-1]))


def attributes_of(kind, shape, bond_dim):
    layout = make_layout(kind, *shape[-2:])
    factors = {"row_factors": list(layout.row_factors), "col_factors": list(layout.col_factors)}
    return layout, factors, {"rows": layout.rows, "cols": layout.cols, **factors, "bonds": list(layout.bonds(bond_dim))}


def model(op, x, outputs, attributes, fallback=False):
    node = make_node(op, ["x"], list(outputs), **attributes)
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    value = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
    graph = helper.make_graph([node], "one_node", [value], values)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [function_proto(op, 21)] if fallback else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def run(proto, x, library=True, threads=1):
    return cpu_session(proto, library=library, threads=threads).run(None, {"x": x})


def encode_outputs(dtype):
    return {
        "cores": ELEMENTS[dtype],
        "ranks": TensorProto.INT64,
        "error": TensorProto.DOUBLE,
        "lower_bound": TensorProto.DOUBLE,
    }


def relative(found, wanted):
    difference = np.linalg.norm(found.astype(np.float64) - wanted, axis=(-2, -1))
    return difference / np.linalg.norm(wanted, axis=(-2, -1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tol", [0.0, 0.02])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "bond_dim"), SHAPES)
def test_kernel_is_the_reference(shape, bond_dim, kind, tol, dtype):
    """Cores may differ by what is equally good: the matrix that they make, the ranks and the errors may not."""
    M = matrix(shape)
    layout, factors, attributes = attributes_of(kind, shape, bond_dim)
    settings = {**factors, "bond_dim": bond_dim, "tol": tol}
    want = [x.numpy() for x in mps_encode_ref(torch.from_numpy(M), **settings)]
    exact = mps_decode_ref(torch.from_numpy(want[0]), **attributes).numpy()
    binding = _core.mps_encode(M.astype(dtype), **settings)
    for cores, ranks, error, bound in (
        binding,
        run(model("MPSEncode", M.astype(dtype), encode_outputs(dtype), settings), M.astype(dtype)),
    ):
        assert cores.shape == want[0].shape
        assert (ranks == want[1]).all()
        assert np.abs(error - want[2]).max() <= ROUNDING[dtype]
        assert np.abs(bound - want[3]).max() <= ROUNDING[dtype]
        outputs = {"y": ELEMENTS[dtype]}
        decoded = [
            _core.mps_decode(cores, **attributes),
            run(model("MPSDecode", cores, outputs, attributes), cores)[0],
            run(model("MPSDecode", cores, outputs, attributes, fallback=True), cores, library=False)[0],
        ]
        for found in decoded:
            assert found.shape == shape
            assert relative(found, exact).max() <= 10 * ROUNDING[dtype]
    if layout.padded == shape[-2:]:
        assert np.abs(relative(decoded[0], M) - binding[2]).max() <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind):
    M = matrix((512, 512)).astype(np.float32)
    _, factors, attributes = attributes_of(kind, M.shape, 16)
    one, two = (_core.mps_encode(M, **factors, bond_dim=16, tol=0.0, threads=t) for t in (1, 3))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert (_core.mps_decode(one[0], **attributes) == _core.mps_decode(one[0], **attributes, threads=3)).all()
    in_session = run(model("MPSEncode", M, encode_outputs("float32"), {**factors, "bond_dim": 16}), M, threads=2)
    assert all((a == b).all() for a, b in zip(one, in_session, strict=True))


@pytest.mark.parametrize("tol", [0.0, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_rank_deficient_and_zero_matrices(kind, tol):
    M = np.stack([matrix((64, 64), rank=1), np.zeros((64, 64)), matrix((64, 64), rank=3, seed=1)]).astype(np.float32)
    _, factors, attributes = attributes_of(kind, M.shape, 64)
    cores, ranks, error, bound = _core.mps_encode(M, **factors, bond_dim=64, tol=tol)
    found = _core.mps_decode(cores, **attributes)
    assert (error <= max(tol, 1e-6)).all()
    assert (bound <= error + 1e-12).all()
    assert (found[1] == 0).all()
    assert relative(found[[0, 2]], M[[0, 2]].astype(np.float64)).max() <= max(tol, 1e-6) + 1e-6
    if kind == "serial" and tol > 0:  # the middle bond is the rank, and so it is where bond_dim cuts
        assert ranks[:, 6].tolist() == [1, 1, 3]
        assert _core.mps_encode(M, **factors, bond_dim=8, tol=0.0)[1][:, 6].tolist() == [1, 1, 3]


def test_float32_loses_nothing_to_the_gram_matrix():
    """Singular values down to 1e-6 of the largest come back as exactly as float32 holds the matrix."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2))
    sigma = 10.0 ** -np.linspace(0, 6, 64)
    M = (U * sigma) @ V
    _, factors, _ = attributes_of("serial", M.shape, 40)
    tail = np.sqrt((sigma[40:] ** 2).sum() / (sigma**2).sum())
    for dtype, most in (("float32", 3e-8), ("float64", 1e-10)):
        error = _core.mps_encode(M.astype(dtype), **factors, bond_dim=40, tol=0.0)[2]
        assert abs(float(error) - tail) <= most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 8), (2, 3, 20, 11)])
def test_schemas_infer_what_the_ops_return(kind, shape):
    register_schemas()
    M = matrix(shape)
    _, factors, attributes = attributes_of(kind, shape, 4)
    encode = model("MPSEncode", M, encode_outputs("float64"), {**factors, "bond_dim": 4})
    got = run(encode, M)
    decode = model("MPSDecode", got[0], {"y": TensorProto.DOUBLE}, attributes)
    for proto, x, results in ((encode, M, got), (decode, got[0], run(decode, got[0]))):
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        shapes = [tuple(d.dim_value for d in o.type.tensor_type.shape.dim) for o in inferred.graph.output]
        assert shapes == [value.shape for value in results]
        assert [tuple(o.shape) for o in cpu_session(proto).get_outputs()] == shapes
        assert x.dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bond_dim": 0}, "bond_dim must be >= 1, got 0"),
        ({"bond_dim": 2**63 - 1}, "bond_dim must be <= 1048576, got 9223372036854775807"),
        ({"tol": 1.0}, r"tol must be in \[0, 1\), got 1"),
        ({"tol": -0.1}, "tol must be"),
        ({"tol": float("nan")}, "tol must be"),
        ({"row_factors": [2, 2]}, "row_factors and col_factors must be of one length >= 1, got 2 and 3"),
        ({"row_factors": [2, 2, 0]}, "row_factors must be >= 1, got 0"),
    ],
)
def test_wrong_attributes_of_encode(change, message):
    """The same limits in the binding and in the op table."""
    attributes = {"row_factors": [2, 2, 2], "col_factors": [2, 2, 2], "bond_dim": 4, "tol": 0.0} | change
    with pytest.raises(ValueError, match=rf"\[MPSEncode\] {message}"):
        _core.mps_encode(np.ones((8, 8)), **attributes)
    with pytest.raises(UsageError, match=r"\[MPSEncode\] "):
        make_node("MPSEncode", ["x"], ["a", "b", "c", "d"], **attributes)
    x = np.ones((8, 8))
    proto = model("MPSEncode", x, encode_outputs("float64"), {"row_factors": [2, 2, 2], "col_factors": [2, 2, 2]})
    node = proto.graph.node[0]
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    with pytest.raises(Exception, match=rf"\[MPSEncode\] {message}") as caught:
        run(proto, x)
    assert type(caught.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 9}, "rows must be"),
        ({"cols": 0}, "cols must be"),
        ({"bonds": [1, 2, 2]}, "bonds must be 4 numbers"),
        ({"bonds": [1, 2, 2, 2]}, "bonds must be 4 numbers"),
        ({"bonds": [1, 0, 2, 1]}, "bonds must be"),
    ],
)
def test_wrong_attributes_of_decode(change, message):
    attributes = {"rows": 8, "cols": 8, "row_factors": [2, 2, 2], "col_factors": [2, 2, 2], "bonds": [1, 2, 2, 1]} | change
    with pytest.raises(ValueError, match=rf"\[MPSDecode\] {message}"):
        _core.mps_decode(np.ones(32), **attributes)
    with pytest.raises(UsageError, match=r"\[MPSDecode\] "):
        make_node("MPSDecode", ["x"], ["y"], **attributes)


def test_cores_of_more_numbers_than_64_bits_count():
    """2^64 + 2^21 of them; 2^21 are not enough."""
    attributes = {"rows": 4096, "cols": 4096, "row_factors": [1, 4096, 1], "col_factors": [1, 4096, 1]}
    with pytest.raises(ValueError, match=r"\[MPSDecode\] cores must hold at most 2\^40 numbers"):
        _core.mps_decode(np.ones(1 << 21, np.float32), **attributes, bonds=[1, 1 << 20, 1 << 20, 1])


def test_wrong_inputs():
    factors = {"row_factors": [2, 2, 2], "col_factors": [2, 2, 2]}
    spoilt = np.ones((2, 8, 8))
    spoilt[1, 3, 3] = np.nan
    settings = {**factors, "bond_dim": 4, "tol": 0.0}
    for tol in (0.0, 0.1):
        with pytest.raises(ValueError, match="matrix must be finite, got NaN or infinity in matrix 1"):
            _core.mps_encode(spoilt, **settings | {"tol": tol})
    with pytest.raises(ValueError, match="matrix must be finite"):  # complete bonds, nothing to decompose
        _core.mps_encode(spoilt, **settings | {"bond_dim": 64})
    with pytest.raises(Exception, match="matrix must be finite, got NaN or infinity in matrix 1"):
        run(model("MPSEncode", spoilt, encode_outputs("float64"), settings), spoilt)
    for scale in (1e200, 1e-200):  # the squares of finite numbers: infinite, or zero
        for bond_dim in (4, 64):
            with pytest.raises(ValueError, match="the norm of matrix 1 must be 0 or in 1e-140 to 1e150, whose squares"):
                _core.mps_encode(
                    np.stack([np.zeros((8, 8)), scale * np.eye(8)]), **settings | {"bond_dim": bond_dim, "tol": 0.0}
                )
    for bad in ([1e200, np.nan], [np.inf, 1e200]):  # the first bad matrix is named, each for what it is
        where = np.isfinite(bad).tolist().index(False)
        two = np.stack([np.full((8, 8), value) for value in bad])
        message = "matrix must be finite, got NaN or infinity in matrix 0" if where == 0 else "the norm of matrix 0"
        with pytest.raises(ValueError, match=message):
            _core.mps_encode(two, **settings)
    with pytest.raises(ValueError, match="rows of matrix must be in 1 to 8, the product of row_factors, got 9"):
        _core.mps_encode(np.ones((9, 8)), **settings)
    with pytest.raises(ValueError, match="matrix must have 2 to 4 dimensions, got 1"):
        _core.mps_encode(np.ones(8), **settings)
    with pytest.raises(ValueError, match="matrix must be float32 or float64"):
        _core.mps_encode(np.ones((8, 8), np.float16), **settings)
    with pytest.raises(ValueError, match=r"cores must hold 32 numbers on the last axis, got shape \(31,\)"):
        _core.mps_decode(np.ones(31), rows=8, cols=8, **factors, bonds=[1, 2, 2, 1])
