"""Strategy `tree`: the kernel against the float64 reference, and what must hold whatever the inputs."""

import numpy as np
import pytest
from attention_backends import BACKENDS, run_binding, run_ref
from attention_cases import PADDING, clustered
from instruction_sets import ISAS, run_on
from memory_cases import in_a_process_of_its_own

from qexport import _core
from qexport.memory.rss import extra_rss
from qexport.ops import QUANTUM_ATTENTION

TILE = 32
TREE = {"strategy": "tree", "num_samples": [64], "control_variate": 0, "residual": "none"}
CASES = (
    clustered("plain"),
    clustered("one_key_in_the_last_cluster", kv_len=401),
    clustered("odd_sizes", q_len=77, kv_len=409, head_size=13, v_head_size=21),
    clustered("grouped_heads", q_heads=6, kv_heads=2, head_size=32),
    clustered("wide_heads", head_size=80, v_head_size=144, q_heads=1, kv_heads=1),
    clustered("one_budget_per_head", attributes={"num_samples": [32, 150]}),
    clustered("batch", batch=2, q_len=33),
    clustered("past", past_len=150, kv_len=300),
    clustered("bool_padding", batch=2, mask=PADDING, mask_kind="padding"),
    clustered("float_padding", batch=2, mask=PADDING, mask_kind="float_padding"),
    clustered("nonpad", batch=2, nonpad=(400, 290)),
    clustered("causal", q_len=1500, kv_len=1500, attributes={"is_causal": 1}),
    clustered("causal_past", q_len=64, kv_len=64, past_len=1000, attributes={"is_causal": 1}),
    clustered("causal_padding", q_len=1500, kv_len=1500, mask=PADDING, mask_kind="padding", attributes={"is_causal": 1}),
    clustered("scale", attributes={"scale": 0.4}),
    clustered("unbiased", attributes={"residual": "unbiased"}),
    clustered("james_stein", attributes={"residual": "james_stein"}),
    clustered("tolerance", q_len=1024, kv_len=1024, attributes={"error_tolerance": 0.5, "num_samples": [16]}),
)
EXACT_CASES = (
    clustered("few_queries", q_len=31),
    clustered("few_keys", kv_len=255),
    clustered("dense", attributes={"num_samples": [201]}),
    clustered("softcap", attributes={"softcap": 5.0}),
    clustered("window", attributes={"left_window_size": 50}),
    clustered("mask_by_query", mask=("q", "kv"), mask_kind="bool"),
    clustered("mostly_its_own_chunk", q_len=1100, kv_len=1100, attributes={"is_causal": 1}),
    clustered("few_queries_for_a_tolerance", q_len=1023, kv_len=1100, attributes={"error_tolerance": 0.9}),
    clustered("few_keys_for_a_tolerance", q_len=1024, kv_len=1024, attributes={"error_tolerance": 0.19}),
)


def ids(cases):
    return [case.name for case in cases]


def attributes_of(case, **more):
    return TREE | case.attributes | more


def relative(found, reference, axis=None):
    return np.linalg.norm(found - reference, axis=axis) / np.linalg.norm(reference, axis=axis)


def exact(case, feeds):
    return run_ref(
        feeds,
        "float32",
        0,
        attributes_of(case, strategy="exact", residual="verify_only", error_tolerance=0.0, precision="fp32"),
    )["Y"]


def tiles(x):
    """(batch, heads, tiles, 32 * size) of (batch, heads, q_len, size), without the last partial tile."""
    whole = x.shape[2] // TILE * TILE
    return x[:, :, :whole].reshape(*x.shape[:2], whole // TILE, -1)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_kernel_is_the_reference(case):
    """Tile by tile. In float32 a key may fall on the other side of a split, or a cluster on that of a choice: then a few
    tiles differ by a fraction of the error that `tree` has anyway. A wrong formula would differ in all of them."""
    feeds = case.inputs()
    attributes = attributes_of(case)
    reference, found = run_ref(feeds, "float32", 5, attributes), run_binding(feeds, "float32", 5, attributes)
    differences = relative(tiles(found["Y"]), tiles(reference["Y"]), axis=-1)
    assert np.mean(differences < 1e-4) >= 0.9, np.sort(differences.ravel())[::-1][:8]
    of_all_keys = exact(case, feeds)
    error = relative(reference["Y"], of_all_keys)
    assert 1e-3 < error < 0.9, "a case in which tree has nothing to do shows nothing"
    np.testing.assert_allclose(relative(found["Y"], of_all_keys), error, rtol=0.05)
    np.testing.assert_allclose(found["error_estimate"], reference["error_estimate"], rtol=0.15, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_kernel_is_the_reference_on_every_instruction_set(isa):
    code = "import test_tree as t; print(len([t.test_kernel_is_the_reference(case) for case in t.CASES]))"
    assert int(run_on(isa, code)) == len(CASES)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("case", EXACT_CASES, ids=ids(EXACT_CASES))
def test_what_is_no_case_for_tree_is_exact(backend, case):
    feeds = case.inputs()
    found = BACKENDS[backend](feeds, "float32", 0, attributes_of(case))
    np.testing.assert_allclose(found["Y"], exact(case, feeds), rtol=1e-4, atol=1e-5)
    assert (found["error_estimate"] == 0).all()


PRECISIONS = pytest.mark.parametrize(("precision", "limit"), [("fp32", 2e-6), ("bf16", 0.01), ("int8", 0.03)])


@pytest.mark.parametrize("case", [c for c in CASES if c.q_heads > 1 and c.name != "tolerance"], ids=lambda case: case.name)
@PRECISIONS
def test_a_head_that_reads_all_is_exact_beside_one_that_does_not(case, precision, limit):
    """The way that reads all clusters: each key once, masked ones never."""
    feeds = case.inputs()
    samples = [32] + [case.past_len + case.kv_len] * (case.q_heads - 1)
    found = run_binding(feeds, "float32", 0, attributes_of(case, num_samples=samples, precision=precision))
    expected = exact(case, feeds)
    assert relative(found["Y"][:, 1:], expected[:, 1:]) < limit
    assert relative(found["Y"][:, 0], expected[:, 0]) > 1e-3
    assert (found["error_estimate"][:, 1:] == 0).all()


@PRECISIONS
def test_a_tolerance_that_no_tile_meets_makes_all_exact(precision, limit):
    case = clustered("noise", q_len=1024, kv_len=2048, attributes={"error_tolerance": 0.1, "precision": precision})
    feeds = case.inputs()
    rng = np.random.default_rng(0)
    feeds |= {name: rng.standard_normal(feeds[name].shape, dtype=np.float32) for name in ("K", "V")}
    found = run_binding(feeds, "float32", 0, attributes_of(case))
    assert relative(found["Y"], exact(case, feeds)) < limit
    assert (found["error_estimate"] == 0).all()


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_backends_and_threads_agree_to_the_bit(backend):
    case = clustered("threads", batch=2, q_heads=6, kv_heads=2, q_len=200, kv_len=700)
    feeds, attributes = case.inputs(), attributes_of(case, residual="james_stein", precision="auto")
    expected = run_binding(feeds, "float32", 7, attributes)
    for threads in (1, 2, 5):
        found = BACKENDS[backend](feeds, "float32", 7, attributes, threads=threads)
        for name in ("Y", "error_estimate"):
            np.testing.assert_array_equal(found[name], expected[name])


def test_only_the_residual_depends_on_the_seed():
    case = clustered("seeds")
    feeds = case.inputs()

    def output(residual, seed):
        return run_binding(feeds, "float32", seed, attributes_of(case, residual=residual))["Y"]

    np.testing.assert_array_equal(output("verify_only", 1), output("none", 2))
    assert not np.array_equal(output("unbiased", 1), output("unbiased", 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype):
    case = clustered("plain")
    feeds, attributes = case.inputs(), attributes_of(case)
    typed = run_binding(feeds, dtype, 0, attributes)["Y"]
    error = relative(run_binding(feeds, "float32", 0, attributes)["Y"], exact(case, feeds))
    np.testing.assert_allclose(relative(typed, exact(case, feeds)), error, rtol=0.1)


def test_no_query_sees_keys_and_values_behind_it():
    case = clustered("causal", q_len=1500, kv_len=1500, attributes={"is_causal": 1, "residual": "unbiased"})
    feeds, attributes = case.inputs(), attributes_of(case)
    before = run_binding(feeds, "float32", 0, attributes)["Y"]
    for cut in (1499, 1024, 700):
        changed = {name: value.copy() for name, value in feeds.items()}
        changed["K"][:, :, cut:] += 3
        changed["V"][:, :, cut:] -= 100
        after = run_binding(changed, "float32", 0, attributes)["Y"]
        np.testing.assert_array_equal(after[:, :, :cut], before[:, :, :cut])
        assert not np.array_equal(after[:, :, cut:], before[:, :, cut:])


@pytest.mark.parametrize("residual", ["none", "unbiased", "james_stein"])
def test_queries_reach_back_to_the_first_row_of_their_tile_and_no_further(residual):
    case = clustered("causal", q_len=1500, kv_len=1500, attributes={"is_causal": 1, "residual": residual})
    feeds, attributes = case.inputs(), attributes_of(case)
    before = run_binding(feeds, "float32", 0, attributes)["Y"]
    first, last = 1024, 1024 + TILE - 1
    changed = {name: value.copy() for name, value in feeds.items()}
    changed["Q"][:, :, last] *= -3
    after = run_binding(changed, "float32", 0, attributes)["Y"]
    assert not np.array_equal(after[:, :, first], before[:, :, first])
    for name in "QKV":
        changed[name][:, :, last + 1 :] *= -3
    after = run_binding(changed, "float32", 0, attributes)["Y"]
    np.testing.assert_array_equal(after[:, :, :first], before[:, :, :first])


def test_masked_keys_are_never_read():
    case = clustered("bool_padding", batch=2, mask=PADDING, mask_kind="padding")
    feeds, attributes = case.inputs(), attributes_of(case)
    expected = run_binding(feeds, "float32", 0, attributes)["Y"]
    masked = ~np.broadcast_to(feeds["attn_mask"], (2, 1, 1, 400))[:, 0, 0]
    for name in ("K", "V"):
        feeds[name] = np.where(masked[:, None, :, None], np.float32(np.nan), feeds[name])
    np.testing.assert_array_equal(run_binding(feeds, "float32", 0, attributes)["Y"], expected)


@pytest.mark.parametrize("kind", ["padding", "float_padding"])
def test_a_mask_written_out_for_every_row_is_the_mask_of_all(kind):
    case = clustered("bool_padding", batch=2, mask=PADDING, mask_kind=kind)
    feeds, attributes = case.inputs(), attributes_of(case)
    mask = np.broadcast_to(feeds["attn_mask"], (2, 2, 96, 400)).copy()
    other = mask.copy()
    other[1, 1, 95, 7] = other[1, 1, 95, -1]  # masked
    assert (other != mask).any()
    for run in (run_binding, run_ref):
        expected = run(feeds, "float32", 0, attributes)["Y"]
        np.testing.assert_array_equal(run(feeds | {"attn_mask": mask}, "float32", 0, attributes)["Y"], expected)
        found = run(feeds | {"attn_mask": other}, "float32", 0, attributes)["Y"]
        assert relative(found, exact(case, feeds | {"attn_mask": other})) < 1e-5 < relative(found, expected)


def test_a_batch_item_without_keys_is_zero():
    case = clustered("bool_padding", batch=2, mask=PADDING, mask_kind="padding")
    feeds = case.inputs()
    feeds["attn_mask"][1] = False
    found = run_binding(feeds, "float32", 0, attributes_of(case))
    assert (found["Y"][1] == 0).all()
    assert (found["error_estimate"][1] == 0).all()
    assert np.isfinite(found["Y"][0]).all()


def test_more_keys_less_error():
    case = clustered("more", q_len=256, kv_len=2048, head_size=32, v_head_size=32)
    feeds = case.inputs()
    reference = exact(case, feeds)
    few, more, most = (
        relative(run_binding(feeds, "float32", 0, attributes_of(case, num_samples=[s]))["Y"], reference)
        for s in (64, 256, 1024)
    )
    assert few > 1.1 * more
    assert more > 1.25 * most


@pytest.mark.parametrize("extreme", [0.0, 1e4, 1e19])
def test_extreme_keys_stay_finite(extreme):
    """Equal keys, scores far beyond what exp holds, and squares beyond float32 in the tree."""
    case = clustered("plain")
    feeds = case.inputs()
    feeds["K"] = feeds["K"] * np.float32(extreme)
    if extreme > 1e10:
        feeds["Q"] = feeds["Q"] * np.float32(1e-19)
    found = run_binding(feeds, "float32", 0, attributes_of(case))
    assert np.isfinite(found["Y"]).all()
    if extreme == 0.0:  # the weights are equal then, and centroids are right
        np.testing.assert_allclose(found["Y"], exact(case, feeds), rtol=1e-4, atol=1e-5)


def extra_of_a_call(length) -> int | None:
    x = np.zeros((1, 1, length, 32), np.float32)
    x[..., 0] = np.arange(length) % 97
    attributes = {k: v for k, v in QUANTUM_ATTENTION.resolve({"strategy": "tree"}).items() if v is not None}
    return extra_rss(lambda: _core.quantum_attention(x, x, x, **attributes))


def test_scratch_has_no_queries_times_keys():
    """Twice the length, twice the memory."""
    one, two = (in_a_process_of_its_own(extra_of_a_call, length) for length in (16384, 32768))
    if two is None:
        pytest.skip("this system does not tell")
    queries_times_clusters = 4 * 32768**2 / 16
    assert two < queries_times_clusters / 8
    assert 0 < two < 2.5 * one
