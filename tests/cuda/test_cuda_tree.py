"""Strategies `tree` and `hybrid` by their CUDA kernels, against the reference, as on the CPU."""

from functools import partial

import numpy as np
import pytest
import test_hybrid
import test_tree
from attention_backends import rounded, run_ref
from attention_cases import PADDING, clustered
from calls import attention, ids
from devices import split
from test_tree import attributes_of, exact, relative

from qexport.ops.quantum_attention_tree_ref import CUDA

SMALL = 100 * 420 * 6  # queries x keys x heads that the emulation takes

# In the emulation the tree is used from few keys on. Rows of 16-byte units, as the kernels take them.
cuda = partial(clustered, q_len=140, kv_len=330, head_size=16, v_head_size=24)
EMULATED = (
    cuda("plain"),
    cuda("full_last_cluster", kv_len=320, q_len=128),
    cuda("grouped_heads", q_heads=4, kv_heads=2, head_size=32),
    cuda("wide_heads", head_size=80, v_head_size=128, q_heads=1, kv_heads=1),
    cuda("heads_of_64", head_size=48, v_head_size=64, q_heads=1, kv_heads=1),
    cuda("blocks_of_clusters", q_len=128, kv_len=9000, q_heads=1, kv_heads=1, attributes={"num_samples": [4400]}),
    cuda("wide_blocks_of_clusters", q_len=128, kv_len=4300, head_size=72, v_head_size=128, q_heads=1, kv_heads=1),
    cuda("one_budget_per_head", attributes={"num_samples": [64, 150]}),
    cuda("past", past_len=130, kv_len=200),
    cuda("padding", batch=2, q_heads=1, kv_heads=1, kv_len=600, mask=PADDING, mask_kind="padding"),
    cuda("nonpad", batch=2, nonpad=(330, 270), q_heads=1, kv_heads=1),
    cuda("causal", q_len=300, kv_len=300, past_len=800, q_heads=1, kv_heads=1, attributes={"is_causal": 1}),
    cuda(
        "causal_queries_beyond_keys",
        q_len=1300,
        kv_len=1250,
        q_heads=1,
        kv_heads=1,
        attributes={"is_causal": 1, "num_samples": [32]},
    ),
    cuda("negative_scale", attributes={"scale": -0.4}),
    cuda("tolerance", q_len=1024, kv_len=1024, q_heads=1, kv_heads=1, attributes={"error_tolerance": 0.5}),
)
# Of more clusters than two half-samples of a tile hold.
drawn = partial(cuda, kv_len=1500, q_heads=1, kv_heads=1)
EMULATED += (
    drawn("unbiased", q_heads=2, attributes={"residual": "unbiased"}),
    drawn("james_stein", q_heads=2, kv_heads=2, attributes={"residual": "james_stein", "layer": 3}),
    drawn("unbiased_nonpad", batch=2, nonpad=(1480, 700), head_size=32, attributes={"residual": "unbiased"}),
    drawn("unbiased_heads_of_64", head_size=48, v_head_size=64, attributes={"residual": "unbiased", "num_samples": [150]}),
    drawn("james_stein_wide", head_size=72, v_head_size=128, attributes={"residual": "james_stein", "scale": -0.1}),
    drawn(
        "james_stein_causal",
        q_len=300,
        kv_len=300,
        past_len=1100,
        attributes={"residual": "james_stein", "is_causal": 1},
    ),
    drawn(
        "james_stein_tolerance",
        q_len=1024,
        kv_len=1024,
        attributes={"residual": "james_stein", "error_tolerance": 0.5},
    ),
)
long = partial(clustered, q_len=1024, kv_len=12300, head_size=64, v_head_size=64)
ON_A_GPU = (
    long("long"),
    long("long_wide", head_size=128, v_head_size=96),
    long("long_padding", batch=2, mask=PADDING, mask_kind="padding"),
    long("long_nonpad", batch=2, nonpad=(12300, 5000)),
    long("long_causal", q_len=1100, kv_len=1100, past_len=12000, attributes={"is_causal": 1}),
    long("long_tolerance", attributes={"error_tolerance": 0.3}),
    long("long_unbiased", head_size=32, attributes={"residual": "unbiased"}),
    long("long_james_stein", batch=2, nonpad=(12300, 5000), attributes={"residual": "james_stein"}),
    long("long_james_stein_wide", head_size=96, v_head_size=128, attributes={"residual": "james_stein"}),
    long("long_james_stein_tolerance", attributes={"residual": "james_stein", "error_tolerance": 0.4}),
    long(
        "long_unbiased_causal",
        q_len=1100,
        kv_len=1100,
        past_len=12000,
        attributes={"residual": "unbiased", "is_causal": 1},
    ),
)


def small(case):
    return case.batch * case.q_heads * case.q_len * (case.past_len + case.kv_len) <= SMALL


def cuda_tiles(x):
    """(batch, heads, tiles, rows * size), without the last partial tile."""
    whole = x.shape[2] // CUDA.queries * CUDA.queries
    return x[:, :, :whole].reshape(*x.shape[:2], whole // CUDA.queries, -1)


LIMITS = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}
# Emulated beside float16, whose code float32 shares but for its tiles, one for each of three sizes of heads.
IN_FLOAT32 = ("plain", "wide_heads", "heads_of_64", "blocks_of_clusters", "nonpad", "causal", "negative_scale", "tolerance")
IN_BFLOAT16 = ("plain", "causal", "unbiased")  # the same code as for float16
WITHOUT_WARPGROUPS = ("wide_heads", "heads_of_64", "wide_blocks_of_clusters", "james_stein_wide")


@pytest.mark.parametrize(
    ("device", "case", "dtype"),
    [
        *(("emulated", c, "float16") for c in EMULATED),
        *(("emulated", c, "bfloat16") for c in EMULATED if c.name in IN_BFLOAT16),
        *(("emulated", c, "float32") for c in EMULATED if c.name in IN_FLOAT32 or "residual" in c.attributes),
        *(("emulated_sm86", c, t) for c in EMULATED if c.name in WITHOUT_WARPGROUPS for t in ("float16", "bfloat16")),
        ("emulated_sm86", next(c for c in EMULATED if c.name == "heads_of_64"), "float32"),
        *(pytest.param("gpu", c, t, marks=pytest.mark.gpu) for c in ON_A_GPU for t in LIMITS),
    ],
    ids=ids,
    indirect=["device"],
)
def test_tree_is_the_reference(device, case, dtype):
    """Tile by tile, as on the CPU; and as far from exact attention."""
    # Inclusion probabilities follow variances in bfloat16, also beside float16.
    limit = LIMITS[dtype] * (2 if "residual" in case.attributes and dtype == "float16" else 1)
    feeds, attributes = rounded(case.inputs(), dtype), attributes_of(case)
    reference = run_ref(feeds, dtype, 5, attributes | {"blocks": CUDA})
    found = attention(device, feeds, dtype, 5, attributes)
    differences = relative(cuda_tiles(found["Y"]), cuda_tiles(reference["Y"]), axis=-1)
    # Half-samples of many clusters: rounding draws others in up to 2 of 16 tiles; few draws of much err by all of it.
    many_draws = case in ON_A_GPU and case.attributes.get("residual") == "unbiased"
    assert np.mean(differences < limit) >= (0.8 if many_draws else 0.9), np.sort(differences.ravel())[::-1][:8]
    error = relative(reference["Y"], exact(case, feeds))
    assert 8 * limit < error < (1.2 if many_draws else 0.9), "a case in which tree has nothing to do shows nothing"
    np.testing.assert_allclose(relative(found["Y"], exact(case, feeds)), error, rtol=0.05)
    np.testing.assert_allclose(found["error_estimate"], reference["error_estimate"], rtol=0.15, atol=1e-4)


def test_a_tolerance_that_no_tile_meets_makes_all_exact(emulated):
    case = cuda("noise", q_len=1024, kv_len=1100, q_heads=1, kv_heads=1, attributes={"error_tolerance": 0.2})
    feeds = case.inputs()
    feeds["K"] = np.random.default_rng(0).standard_normal(feeds["K"].shape, dtype=np.float32)
    feeds = rounded(feeds, "float16")
    found = attention(emulated, feeds, "float16", 0, attributes_of(case))
    assert relative(found["Y"], exact(case, feeds)) < 1e-3
    assert (found["error_estimate"] == 0).all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", [c for c in EMULATED if c.name in ("plain", "nonpad", "heads_of_64")], ids=ids)
def test_half_samples_of_all_that_is_not_read_are_exact(emulated, case, dtype):
    """Of four clusters or fewer, the last one of fewer keys among them."""
    feeds, attributes = rounded(case.inputs(), dtype), attributes_of(case, residual="unbiased")
    found = attention(emulated, feeds, dtype, 5, attributes)
    assert relative(found["Y"], exact(case, feeds)) < LIMITS[dtype]
    assert (found["error_estimate"] < LIMITS[dtype]).all()
    assert (found["error_estimate"] > 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 1, -(2**63)])
def test_draws_are_those_of_the_reference(emulated, seed):
    case = next(c for c in EMULATED if c.name == "unbiased")
    feeds, attributes = case.inputs(), attributes_of(case)
    found = attention(emulated, feeds, "float32", seed, attributes)["Y"]
    reference, other = (run_ref(feeds, "float32", s, attributes | {"blocks": CUDA})["Y"] for s in (seed, seed ^ 2**33))
    assert relative(found, reference) < LIMITS["float32"]
    assert relative(other, reference) > 0.1


@pytest.mark.parametrize("residual", ["none", "unbiased"])
def test_a_batch_item_without_keys_is_0(emulated, residual):
    case = cuda("nonpad", batch=2, nonpad=(330, 0), q_heads=1, kv_heads=1, attributes={"residual": residual})
    found = attention(emulated, rounded(case.inputs(), "float16"), "float16", 5, attributes_of(case))
    assert np.abs(found["Y"][0]).max() > 0
    assert (found["Y"][1] == 0).all()
    assert found["error_estimate"][1] == 0


@pytest.mark.parametrize("name", ["plain", "james_stein"])
def test_float32_keeps_its_range(emulated, name):
    """Numbers beyond float16, times powers of two, which round nothing: choices, draws and digits stay."""
    case = next(c for c in EMULATED if c.name == name)
    feeds, attributes = case.inputs(), attributes_of(case)
    before = attention(emulated, feeds, "float32", 5, attributes)
    feeds["Q"] /= 2.0**30
    feeds["K"] *= 2.0**30
    feeds["V"] *= 2.0**30
    after = attention(emulated, feeds, "float32", 5, attributes)
    assert before["error_estimate"].all()
    np.testing.assert_array_equal(after["Y"], before["Y"] * 2.0**30)
    np.testing.assert_array_equal(after["error_estimate"], before["error_estimate"])


@pytest.mark.parametrize(("residual", "dtype"), [("none", "float32"), ("none", "float16"), ("unbiased", "float16")])
def test_no_query_sees_the_future(emulated, residual, dtype):
    case = next(c for c in EMULATED if c.name == "causal")
    feeds, attributes = rounded(case.inputs(), dtype), attributes_of(case, residual=residual)
    before = attention(emulated, feeds, dtype, 0, attributes)["Y"]
    for cut in (299, 230):
        changed = {name: value.copy() for name, value in feeds.items()}
        changed["K"][:, :, cut:] += 3
        changed["V"][:, :, cut:] -= 100
        after = attention(emulated, changed, dtype, 0, attributes)["Y"]
        np.testing.assert_array_equal(after[:, :, :cut], before[:, :, :cut])
        assert not np.array_equal(after[:, :, cut:], before[:, :, cut:])


@pytest.mark.parametrize(
    ("device", "case"), split([(c,) for c in test_tree.EXACT_CASES], small), ids=ids, indirect=["device"]
)
def test_what_is_no_case_for_tree_is_exact(device, case):
    feeds = case.inputs()
    found = attention(device, feeds, "float32", 0, attributes_of(case))
    np.testing.assert_allclose(found["Y"], exact(case, feeds), rtol=1e-4, atol=1e-5)
    assert (found["error_estimate"] == 0).all()


@pytest.mark.parametrize(
    ("device", "dtype"), [("emulated_sm75", "float16"), ("emulated_sm86", "float32")], indirect=["device"]
)
def test_what_does_not_fit_is_exact(device, dtype):
    case = next(c for c in EMULATED if c.name == "wide_heads")
    feeds = rounded(case.inputs(), dtype)
    found = attention(device, feeds, dtype, 0, attributes_of(case))
    assert relative(found["Y"], exact(case, feeds)) < LIMITS[dtype]
    assert (found["error_estimate"] == 0).all()


HYBRID_LIMITS = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}
HYBRID_CASES = [
    (case, dtype)
    for case in test_hybrid.CASES
    for dtype in HYBRID_LIMITS
    if dtype == "float32" or case.mask_kind != "float_padding"  # the lowest float32 is no number of the other types
]


@pytest.mark.parametrize(
    ("device", "case", "dtype"),
    split(HYBRID_CASES, lambda case, dtype: small(case) and (dtype == "float32" or case.name == "plain")),
    ids=ids,
    indirect=["device"],
)
def test_hybrid_is_the_reference(device, case, dtype):
    """But for rows where float32 ranks two keys the other way round."""
    limit = HYBRID_LIMITS[dtype]
    feeds, attributes = rounded(case.inputs(), dtype), test_hybrid.attributes_of(case)
    reference = run_ref(feeds, dtype, 5, attributes)["Y"]
    found = attention(device, feeds, dtype, 5, attributes)["Y"]
    assert np.mean(np.abs(found - reference).max(-1) <= limit * np.abs(reference).max()) >= 0.99
