"""Parity of every op: backend x dtype x case, against the float64 reference."""

import numpy as np
import onnxruntime
import pytest
from attention_backends import BACKENDS, DTYPES, one_node_model, rounded, run_binding, run_ort, run_ref
from attention_cases import CASES, Case, clustered

from qexport import _core
from qexport.errors import UsageError
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.proto import function_proto
from qexport.ops.strategies import BLOCKWISE, STRATEGIES

DRAWING = [s for s in STRATEGIES if s not in BLOCKWISE]  # these draw keys query by query

# Error allowed relative to the largest value of the output: rounding of the output type, and float32 inside.
TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}
SAMPLES = 6  # below the key count of most cases, so that sampling is really sampled


def assert_close(got, want, dtype, what, flips=0):
    """Row-wise comparison; `flips` rows may differ altogether (see `allowed_flips`)."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if want.size == 0:
        return
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite]), f"{what}: infinities differ"
    error = np.where(finite, np.abs(got - np.where(finite, want, 0)), 0)
    scale = np.abs(want[finite]).max(initial=1e-3)
    bad_rows = (error > TOLERANCE[dtype] * scale).any(-1).sum()
    assert bad_rows <= flips, f"{what}: {bad_rows} rows off, largest error {error.max():.3g} at scale {scale:.3g}"


def allowed_flips(rows: int, samples: int, keys: int) -> int:
    """How many rows may draw another key because float32 moves an edge of the fixed-point CDF.

    An edge is off by at most about keys * 2^-22 strata (float32 rounding of c, x and their sum); one of `samples` points
    falls into such a gap with probability samples * keys * 2^-22 per row at most. The bound below is that mean plus five
    Poisson sigma.
    """
    mean = rows * samples * keys * 2.0**-22
    return int(mean + 5 * np.sqrt(mean))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_quantum_attention_exact(case, backend, dtype):
    feeds = rounded(case.inputs(), dtype)
    attributes = case.all_attributes(strategy="exact")
    want = run_ref(feeds, dtype, 0, attributes)
    got = BACKENDS[backend](feeds, dtype, 0, attributes)
    for name, value in got.items():
        assert_close(value, want[name], dtype, name)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("softcap_mask_causal", "bool_mask_2d", "nonpad_causal", "3d")],
    ids=lambda c: c.name,
)
def test_qk_matmul_output(case, backend, mode):
    feeds = case.inputs()
    attributes = case.all_attributes(strategy="stratified", num_samples=SAMPLES, qk_matmul_output_mode=mode)
    got = BACKENDS[backend](feeds, "float32", 0, attributes)["qk_matmul_output"]
    assert_close(got, run_ref(feeds, "float32", 0, attributes)["qk_matmul_output"], "float32", "qk_matmul_output")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_probabilities_beside_the_output(case, strategy, dtype):
    """They come out of the same pass as the output, which is what it is without them."""
    feeds = rounded(case.inputs(), dtype)
    attributes = case.all_attributes(strategy=strategy, num_samples=SAMPLES, layer=3)
    alone = run_binding(feeds, dtype, 7, attributes)
    got = run_binding(feeds, dtype, 7, attributes | {"qk_matmul_output_mode": 3})
    want = run_ref(feeds, dtype, 7, attributes | {"qk_matmul_output_mode": 3})
    assert_close(got["qk_matmul_output"], want["qk_matmul_output"], dtype, "qk_matmul_output")
    assert_close(got["Y"], alone["Y"], dtype, "Y")


@pytest.mark.parametrize("keys", [2000, 2100])
def test_adaptive_with_its_probabilities_kept_and_computed_twice(keys):
    """16 MiB of probabilities are kept between its two phases: those of 2000 rows, not those of 2100."""
    rng = np.random.default_rng(keys)
    feeds = {name: rng.standard_normal((1, 1, keys, 8), dtype=np.float32) for name in "QKV"}
    attributes = {"strategy": "adaptive", "num_samples": SAMPLES}
    want = run_ref(feeds, "float32", 5, attributes)["Y"]
    for threads in (1, 2):
        off = np.abs(run_binding(feeds, "float32", 5, attributes, threads)["Y"] - want).max(-1)
        # A weight is p_j / pi_j, of many small numbers in float32; another draw moves a row by far more.
        assert (off > 1e-3).sum() <= allowed_flips(keys, SAMPLES, keys)
        assert np.median(off) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("control_variate", [0, 1])
@pytest.mark.parametrize("strategy", DRAWING)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_quantum_attention_sampled(case, strategy, control_variate, dtype):
    """The kernel draws the keys that the reference draws, from the same Philox words."""
    feeds = rounded(case.inputs(), dtype)
    attributes = case.all_attributes(strategy=strategy, num_samples=SAMPLES, control_variate=control_variate, layer=3)
    want = run_ref(feeds, dtype, 1234567890123, attributes)
    rows = case.batch * case.q_heads * case.q_len
    for backend in BACKENDS if dtype == "float32" else ("ort",):
        got = BACKENDS[backend](feeds, dtype, 1234567890123, attributes)
        flips = allowed_flips(rows, SAMPLES, case.past_len + case.kv_len)
        assert_close(got["Y"], want["Y"], dtype, f"{backend} Y", flips)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in ("exact", "naive")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_enough_samples_are_exact(case, strategy):
    feeds = case.inputs()
    samples = case.past_len + case.kv_len
    exact = run_ort(feeds, "float32", 0, case.all_attributes(strategy="exact"))["Y"]
    got = run_ort(feeds, "float32", 9, case.all_attributes(strategy=strategy, num_samples=samples))["Y"]
    assert_close(got, exact, "float32", "Y")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_per_head(strategy):
    case = next(c for c in CASES if c.name == "longer_than_a_tile")
    feeds, attributes = case.inputs(), case.all_attributes(strategy=strategy, num_samples=[4, 150, 9, 31])
    want = run_ref(feeds, "float32", 5, attributes)["Y"]
    flips = allowed_flips(case.batch * case.q_heads * case.q_len, 64, case.kv_len)
    for run in (run_binding, run_ort):
        assert_close(run(feeds, "float32", 5, attributes)["Y"], want, "float32", run.__name__, flips)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["longer_than_a_tile", "causal_long", "grouped_heads"])
def test_threads_do_not_change_the_result(name, strategy):
    case = next(c for c in CASES if c.name == name)
    feeds, attributes = case.inputs(), case.all_attributes(strategy=strategy, num_samples=SAMPLES)
    one = run_ort(feeds, "float32", 7, attributes, threads=1)
    for threads in (2, 3):
        many = run_ort(feeds, "float32", 7, attributes, threads=threads)
        assert all(np.array_equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("strategy", DRAWING)
def test_seed_and_layer_choose_the_draws(strategy):
    case = next(c for c in CASES if c.name == "plain")
    feeds = case.inputs()

    def y(seed, layer):  # without control variate: with it, `hybrid` draws nothing
        attributes = case.all_attributes(strategy=strategy, num_samples=4, layer=layer, control_variate=0)
        return run_ort(feeds, "float32", seed, attributes)["Y"]

    assert np.array_equal(y(1, 0), y(1, 0))
    assert not np.array_equal(y(1, 0), y(2, 0))
    assert not np.array_equal(y(1, 0), y(1, 1))
    assert not np.array_equal(y(1, 0), y(1 + (1 << 32), 0)), "the high word of the seed must count"


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1, 0.5])
def test_a_seed_that_is_no_integer_of_64_bits(seed):
    with pytest.raises(TypeError, match=rf"\[QuantumAttention\] seed must be an integer of 64 bits, got {seed}"):
        run_binding(CASES[0].inputs(), "float32", seed, {})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows_and_keys", [(0, 5), (3, 0), (0, 3000)])
def test_no_queries_and_no_keys(rows_and_keys, strategy):
    case = Case("nothing", q_len=rows_and_keys[0], kv_len=rows_and_keys[1])
    for run in (run_ref, run_binding, run_ort):
        y = run(case.inputs(), "float32", 0, case.all_attributes(strategy=strategy, num_samples=SAMPLES))["Y"]
        np.testing.assert_array_equal(y, np.zeros((2, 4, rows_and_keys[0], 16)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"strategy": "stratified", "precision": "bf16"},
            "precision must be fp32 or auto with strategy stratified",
        ),
        ({"strategy": "exact", "error_tolerance": 0.1}, "error_tolerance needs strategy tree, got exact; set it to 0"),
        ({"strategy": "tree", "error_tolerance": 1.5}, "error_tolerance must be"),
        ({"strategy": "tree", "error_tolerance": -0.5}, "error_tolerance must be"),
        (
            {"strategy": "tree", "residual": "some"},
            "residual must be one of none, verify_only, unbiased, james_stein",
        ),
        ({"strategy": "exact", "precision": "fp8"}, "precision must be one of fp32, bf16, int8, auto, got 'fp8'"),
    ],
)
def test_attributes_that_do_not_fit(backend, attributes, message):
    """The table refuses them, and so does the kernel behind a hand-made node."""
    with pytest.raises(UsageError, match=message):
        BACKENDS[backend](CASES[0].inputs(), "float32", 0, attributes)
    good = {"strategy": "tree", "precision": "fp32", "error_tolerance": 0.0, "residual": "none"}
    resolved = {n: v for n, v in QUANTUM_ATTENTION.resolve(good).items() if v is not None}
    feeds = CASES[0].inputs()
    with pytest.raises(ValueError, match=message):
        _core.quantum_attention(feeds["Q"], feeds["K"], feeds["V"], **(resolved | attributes))


@pytest.mark.parametrize("run", [run_ref, run_binding])
@pytest.mark.parametrize("strategy", ["exact", "naive", "stratified", "hybrid"])
def test_a_causal_query_owes_nothing_to_later_keys(run, strategy):
    """Neither its values nor its draws; `adaptive` shares its budget over all rows, which moves with them."""
    case = clustered("causal", q_len=300, kv_len=300, attributes={"is_causal": 1})
    attributes = case.all_attributes(strategy=strategy, num_samples=[SAMPLES])
    feeds = case.inputs()
    before = run(feeds, "float32", 3, attributes)["Y"]
    feeds["K"][:, :, 200:] *= -2
    feeds["V"][:, :, 200:] += 100
    after = run(feeds, "float32", 3, attributes)["Y"]
    np.testing.assert_array_equal(after[:, :, :200], before[:, :, :200])
    assert not np.array_equal(after[:, :, 200:], before[:, :, 200:])


def test_error_estimate_is_for_blockwise_strategies():
    feeds = CASES[0].inputs()
    resolved = {n: v for n, v in QUANTUM_ATTENTION.resolve({"strategy": "naive"}).items() if v is not None}
    with pytest.raises(ValueError, match="error_estimate needs strategy exact or tree, got naive"):
        _core.quantum_attention(feeds["Q"], feeds["K"], feeds["V"], **resolved, error_estimate=True)


@pytest.mark.parametrize("name", ["plain", "3d", "grouped_heads", "3d_grouped_odd"])
def test_fallback_of_error_estimate_is_zero(name):
    """The body is exact, and finds the heads of 3-D inputs too."""
    case = next(c for c in CASES if c.name == name)
    feeds, attributes = case.inputs(), case.all_attributes(strategy="tree")
    model = one_node_model(feeds, "float32", ["Y", "error_estimate"], attributes)
    model.opset_import[0].version = 23
    model.functions.append(function_proto("QuantumAttention", 23, 5))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, error = session.run(["Y", "error_estimate"], {**feeds, "seed": np.array(0, np.int64)})
    assert_close(y, run_ref(feeds, "float32", 0, attributes)["Y"], "float32", "Y")
    assert error.dtype == np.float32
    assert np.array_equal(error, np.zeros((case.batch, case.q_heads)))
