"""Strings of symbols: the encoder against all strings there are and against theory, and what a runtime makes of them."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from compression_cases import correlated, model_of, random, run
from instruction_sets import ISAS, run_on

from qexport import _core
from qexport.compression import nodes, trellis
from qexport.compression.layers import find_layers
from qexport.compression.quantize import error_passing, quantize
from qexport.compression.trellis import LEAST_BITS, MOST_BITS, WINDOW, encode, spread_bits, table

VALUES = table().astype(np.float32)
ALL_BITS = range(LEAST_BITS, MOST_BITS + 1)


def encoded(x, bits):
    return _core.trellis_encode(np.asarray(x, np.float32), table=VALUES, bits=bits, threads=2)


def windows_of(symbols, bits):
    """The window of each symbol of a string: the last bits up to it, zeros before the first."""
    found, window = [], 0
    for symbol in symbols:
        window = (window << bits | int(symbol)) % 2**WINDOW
        found.append(window)
    return found


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("bits", "count"), [(1, 12), (2, 6), (3, 4), (4, 3), (5, 2), (6, 2)])
def test_no_string_is_nearer(bits, count):
    x = normal(3, count)
    x[1, count // 2] = np.nan  # anything will do there
    strings = np.array([windows_of(symbols, bits) for symbols in itertools.product(range(2**bits), repeat=count)])
    for row, windows in zip(x, encoded(x, bits), strict=True):
        errors = np.nansum(np.square(row.astype(np.float64) - VALUES[strings]), 1)
        found = np.nansum(np.square(row.astype(np.float64) - VALUES[windows]))
        assert found <= errors.min() * (1 + 1e-5)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_windows_are_those_of_a_string(bits):
    """Rows longer than the encoder decides at once among them."""
    for columns in (1, 5, 2049):
        windows = encoded(normal(2, columns), bits)
        for row in windows:
            np.testing.assert_array_equal(windows_of(row & (2**bits - 1), bits), row)


@pytest.mark.parametrize(("bits", "decibels"), list(zip(ALL_BITS, (0.9, 1.1, 1.4, 1.7, 2.0, 2.4), strict=True)))
def test_normal_numbers_cost_little_more_than_they_must(bits, decibels):
    """No code of R bits per normal number has a mean squared error below 4^-R (Shannon). Here a square varies by no more
    than twice its mean, so that the mean of n by 2 / sqrt(n) of it: four of these are allowed."""
    spread = trellis.SPREAD[bits]
    x = normal(64, 384, seed=5) * spread
    error = np.square(x - VALUES[encoded(x, bits)]).mean() / spread**2
    slack = 1 + 8 / np.sqrt(x.size)
    assert 4.0**-bits / slack <= error <= 4.0**-bits * 10 ** (decibels / 10) * slack


def error(bits) -> float:
    x = normal(4, 99)
    return float(np.square(x - VALUES[encoded(x, bits)]).sum())


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_finds_strings_as_near(isa):
    """Sums of squares in another order may tell two strings of about the same error apart differently."""
    said = run_on(
        isa,
        "import test_trellis as t; print(*(t.error(bits) for bits in t.ALL_BITS))",
    )
    np.testing.assert_allclose([float(word) for word in said.split()], [error(bits) for bits in ALL_BITS], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 0}, "bits must lie between 1 and 6, got 0"),
        ({"bits": 7}, "bits must lie between 1 and 6, got 7"),
        ({"table": VALUES[:-1]}, "table must hold 4096 numbers, got 4095"),
        ({"values": VALUES}, "values must have two axes, got 1"),
        ({"threads": 0}, "threads"),
    ],
)
def test_wrong_arguments_of_the_encoder(changes, words):
    arguments = {"values": normal(1, 8), "table": VALUES, "bits": 2, "threads": 1} | changes
    with pytest.raises(ValueError, match=words):
        _core.trellis_encode(arguments.pop("values"), **arguments)


def test_bits_go_where_errors_cost_most():
    """Against every way to give eight rows 1 to 3 bits, an error of b bits being 4^-b: 1.2 times the least cost at most."""
    importance = np.exp(1.5 * np.random.default_rng(4).standard_normal(8))
    ways = np.array(list(itertools.product(range(1, 4), repeat=8)))
    costs = (importance * 4.0**-ways).sum(1)
    for rate in (1.0, 1.5, 2.0, 2.5, 3.0):
        bits = spread_bits(importance, rate)
        assert bits.mean() <= rate
        if bits.max() > 3:  # more than the ways that are tried
            continue
        assert (importance * 4.0 ** -bits.astype(float)).sum() <= 1.2 * costs[ways.mean(1) <= rate].min()
    assert (spread_bits(np.zeros(5), 2.5) == 2).all()
    assert spread_bits(np.array([1.0, 0.0, 1e-300]), 4.0).tolist() == [6, 3, 3]  # what one cannot use, others get
    assert (spread_bits(np.ones(3), 9.0) == MOST_BITS).all()
    assert (spread_bits(np.ones(3), 0.5) == LEAST_BITS).all()


SHAPES = [(64, 96), (97, 61), (131, 40), (5, 1000)]


def stored(W, form) -> onnx.ModelProto:
    """A model whose output is the matrix, picked or multiplied with, from `form`."""
    rows, columns = W.shape
    use = "y = Gather(w, x)" if form.table else "y = MatMul(x, w)"
    inputs = "int64[m] x" if form.table else f"float[m,{rows}] x"
    model = model_of(
        f'<ir_version: 10, opset_import: ["": 18]> g ({inputs}) => (float[m,{columns}] y) {{ {use} }}', {"w": W}
    )
    graph = ir.from_proto(model)
    nodes.store(graph, find_layers(graph)[0], form)
    return ir.to_proto(graph)


@pytest.mark.parametrize("is_table", [False, True], ids=["product", "table"])
@pytest.mark.parametrize("rate", [1.0, 2.3, 3.5, 5.0, 6.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_onnxruntime_makes_what_dense_says(shape, rate, is_table):
    W = random(*shape)
    W[2, 3] = 40  # stored apart
    weights = np.exp(np.random.default_rng(1).standard_normal(shape[0]))
    form = encode(W, weights, rate, None if is_table else error_passing(np.diag(1 / weights)))
    model = stored(W, form)
    onnx.checker.check_model(model)
    x = np.arange(shape[0]) if is_table else np.eye(shape[0], dtype=np.float32)
    dense = form.dense().T if is_table else form.dense()
    np.testing.assert_array_equal(run(model, {"x": x}), dense)
    assert abs(dense[2, 3] - 40) <= 40 * 2**-10
    assert form.bits.mean() <= rate
    arrays = [tensor for tensor in model.graph.initializer if tensor.name.startswith("w/")]
    assert sum(len(tensor.raw_data) for tensor in arrays) == form.nbytes


def test_the_runtime_makes_the_matrix_when_it_loads(tmp_path):
    """What is left of the graph is the product: no run pays for the strings."""
    W = random(96, 64)
    onnx.save(stored(W, encode(W, np.ones(96), 2.5, error_passing(np.eye(96)))), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["MatMul"]


def test_passed_errors_cost_the_outputs_less():
    X, W = correlated(600, 96), random(96, 400)
    G = X.astype(np.float64).T @ X

    def lost(found):
        return np.square(X @ (W - found)).sum()

    passing = error_passing(G)
    weights = 1 / np.square(np.diag(passing).astype(np.float64))
    found = {rate: lost(encode(W, weights, rate, passing).dense()) for rate in (3.0, 4.0, 5.0)}
    assert found[4.0] < lost(encode(W, np.ones(96), 4.0).dense().T) / 2
    # a grid of 4 bits takes 4.5 with its scales
    assert found[4.0] < lost(quantize(W, 4, 32, passing).dense())
    for rate in (3.0, 4.0):
        assert 3 < found[rate] / found[rate + 1] < 4.5  # 4 for each bit


def test_odd_numbers(recwarn):
    """Zeros, what float16 does not hold, one number among zeros, and tiny ones."""
    W = np.zeros((8, 64), np.float32)
    W[1] = 1e9
    W[2, 5] = 3
    W[3] = 1e-30
    W[4] = normal(64) * 1e-5
    W[5] = normal(64)
    W[5, 0] = -6e4
    dense = encode(W, np.ones(8), 4.0).dense().T
    assert np.isfinite(dense).all()
    assert not dense[0].any()
    assert (dense[1] > 1e4).all()
    assert dense[2, 5] == pytest.approx(3, rel=1e-3)
    assert not np.delete(dense[2], 5).any() or np.abs(np.delete(dense[2], 5)).max() < 1e-3
    assert np.abs(dense[3]).max() < 1e-6
    np.testing.assert_allclose(dense[4], W[4], atol=0.6e-5)
    assert dense[5, 0] == pytest.approx(-6e4, rel=1e-3)
    assert not recwarn.list
