"""Strategy `hybrid` with control variate: largest p |v - mean of its cluster| as they are, other keys by that mean."""

import numpy as np
import pytest
from attention_backends import BACKENDS, rounded, run_binding, run_ref
from attention_cases import PADDING, clustered
from instruction_sets import ISAS, run_on

HYBRID = {"strategy": "hybrid", "control_variate": 1, "residual": "verify_only", "num_samples": [24]}
CASES = (
    clustered("plain"),
    clustered("one_value_in_the_last_cluster", kv_len=401),
    clustered("odd_sizes", q_len=37, kv_len=309, head_size=13, v_head_size=21),
    clustered("narrow_values", kv_len=300, v_head_size=3),
    clustered("wide_values", q_heads=1, kv_heads=1, head_size=8, v_head_size=144),
    clustered("grouped_heads", q_heads=6, kv_heads=2, q_len=50),
    clustered("decoding", q_heads=6, kv_heads=2, q_len=1, past_len=700, kv_len=1),
    clustered("one_budget_per_head", attributes={"num_samples": [8, 150]}),
    clustered("causal", q_len=300, kv_len=300, attributes={"is_causal": 1}),
    clustered("causal_past", q_len=64, kv_len=64, past_len=300, attributes={"is_causal": 1}),
    clustered("window_past", past_len=150, kv_len=300, attributes={"left_window_size": 90, "right_window_size": 20}),
    clustered("bool_padding", batch=2, mask=PADDING, mask_kind="padding"),
    clustered("float_padding", batch=2, mask=PADDING, mask_kind="float_padding"),
    clustered("mask_by_query", mask=("q", "kv"), mask_kind="bool"),
    clustered("nonpad", batch=3, nonpad=(400, 291, 20)),
    clustered("softcap", attributes={"softcap": 3.0}),
)


def attributes_of(case, **more):
    return HYBRID | case.attributes | more


def relative(found, reference):
    return np.linalg.norm(found - reference) / np.linalg.norm(reference)


def exact(case, feeds):
    return run_ref(feeds, "float32", 0, attributes_of(case, strategy="exact"))["Y"]


def share_of_equal_rows(case, dtype="float32", limit=2e-5):
    """Rows of the kernel that are the reference's, up to `limit` of the largest value."""
    feeds = rounded(case.inputs(), dtype)
    reference = run_ref(feeds, dtype, 5, attributes_of(case))["Y"]
    assert relative(reference, exact(case, feeds)) > 1e-3, "a case in which nothing is approximated shows nothing"
    found = run_binding(feeds, dtype, 5, attributes_of(case))["Y"]
    return np.mean(np.abs(found - reference).max(-1) <= limit * np.abs(reference).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_is_the_reference(case):
    """But for rows where float32 ranks two keys the other way round."""
    assert share_of_equal_rows(case) >= 0.99


@pytest.mark.parametrize("isa", ISAS)
def test_kernel_is_the_reference_on_every_instruction_set(isa):
    code = "import test_hybrid as t; print(len([t.test_kernel_is_the_reference(case) for case in t.CASES]))"
    assert int(run_on(isa, code)) == len(CASES)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-3), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("case", [c for c in CASES if c.mask_kind != "float_padding"], ids=lambda case: case.name)
def test_half_types(case, dtype, limit):
    assert share_of_equal_rows(case, dtype, limit) >= 0.99


def known_clusters(rng, clusters=8, size=6):
    """Values whose tree is known: groups of 16 around points far apart on a line, in random order. (v, group of each)."""
    group = rng.permutation(np.repeat(np.arange(clusters), 16))
    v = rng.standard_normal((len(group), size))
    v[:, 0] += 100 * group
    return v.astype(np.float32), group


@pytest.mark.parametrize("samples", [1, 7, 100])
def test_definition(samples):
    """By loops over one row after the other, with clusters that are known without a tree."""
    rng = np.random.default_rng(samples)
    v, group = known_clusters(rng)
    n = len(v)
    q, k = rng.standard_normal((9, 5)).astype(np.float32), (2 * rng.standard_normal((n, 5))).astype(np.float32)
    seen = rng.random((9, n)) < 0.8
    feeds = {"Q": q[None, None], "K": k[None, None], "V": v[None, None], "attn_mask": seen}
    found = run_binding(feeds, "float32", 0, HYBRID | {"num_samples": [samples]})["Y"][0, 0]
    mean = np.stack([v[group == g].mean(0, dtype=np.float64) for g in range(group.max() + 1)])
    for i in range(9):
        p = np.where(seen[i], np.exp(q[i].astype(np.float64) @ k.T / 5**0.5), 0)
        p /= p.sum()
        if seen[i].sum() <= samples:
            expected = p @ v
        else:
            x = p * np.linalg.norm(v - mean[group], axis=1)
            expected = sum(p[j] * (v[j] if x[j] >= np.sort(x)[-samples] else mean[group[j]]) for j in range(n))
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_sum_to_one(case):
    feeds = case.inputs()
    for name in {"V", "past_value"} & set(feeds):
        feeds[name][..., 0] = 1
    y = run_binding(feeds, "float32", 0, attributes_of(case))["Y"]
    np.testing.assert_allclose(y[..., 0], 1, atol=2e-6)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_nothing_is_drawn_and_threads_do_not_count(backend):
    case = clustered("threads", batch=2, q_heads=6, kv_heads=2, q_len=200, kv_len=700)
    feeds = case.inputs()
    expected = run_binding(feeds, "float32", 0, attributes_of(case))["Y"]
    for threads, seed, layer in ((1, 1, 0), (2, 1 << 40, 3), (5, -7, 1)):
        found = BACKENDS[backend](feeds, "float32", seed, attributes_of(case, layer=layer), threads=threads)["Y"]
        np.testing.assert_array_equal(found, expected)


def test_more_keys_less_error_down_to_none():
    case = clustered("plain")
    feeds, reference = case.inputs(), exact(clustered("plain"), case.inputs())
    errors = [
        relative(run_binding(feeds, "float32", 0, attributes_of(case, num_samples=[s]))["Y"], reference)
        for s in (1, 16, 64, 200, 399, 400)
    ]
    assert sorted(errors, reverse=True) == errors
    assert errors[0] < 1
    assert errors[-1] < 1e-6


def test_it_beats_the_strategies_that_draw_where_values_lie_in_groups():
    case = clustered("plain")
    feeds, reference = case.inputs(), exact(clustered("plain"), case.inputs())

    def error(**attributes):
        return relative(run_binding(feeds, "float32", 0, attributes_of(case, **attributes))["Y"], reference)

    assert error() < 0.7 * min(error(strategy="adaptive"), error(strategy="stratified"), error(control_variate=0))


def test_values_that_are_no_numbers():
    case = clustered("nonpad", batch=2, nonpad=(400, 290))
    feeds = case.inputs()
    clean = run_binding(feeds, "float32", 0, attributes_of(case))["Y"]
    feeds["V"][1, :, 290:] = np.nan
    np.testing.assert_array_equal(run_binding(feeds, "float32", 0, attributes_of(case))["Y"], clean)
    feeds["V"][1, 0, 17] = np.nan
    broken = run_binding(feeds, "float32", 0, attributes_of(case))["Y"]
    assert np.isnan(broken[1, 0]).all()
    np.testing.assert_array_equal(broken[1, 1], clean[1, 1])
    np.testing.assert_array_equal(broken[0], clean[0])


def test_a_query_that_is_no_number_and_rows_that_see_nothing():
    case = clustered("mask_by_query", mask=("q", "kv"), mask_kind="bool")
    feeds = case.inputs()
    clean = run_binding(feeds, "float32", 0, attributes_of(case))["Y"]
    feeds["attn_mask"][5] = False
    feeds["Q"][0, 1, 9, 0] = np.nan
    found = run_binding(feeds, "float32", 0, attributes_of(case))["Y"]
    assert (found[:, :, 5] == 0).all()
    assert np.isnan(found[0, 1, 9]).all()
    others = np.ones(found.shape[1:3], bool)
    others[:, 5] = others[1, 9] = False
    np.testing.assert_array_equal(found[0, others], clean[0, others])


@pytest.mark.parametrize("scale", [0.0, 1e30])
def test_norms_of_zero_and_beyond_float32(scale):
    """Equal values are all their own mean; huge ones have norms that run out of float32, and are ranked by p."""
    case = clustered("plain")
    feeds = case.inputs()
    feeds["V"] = (feeds["V"] + 1) * np.float32(scale) if scale else np.full_like(feeds["V"], 0.1)
    y = run_binding(feeds, "float32", 0, attributes_of(case))["Y"]
    reference = exact(case, feeds)
    assert relative(y / 2e30, reference / 2e30) < (0.9 if scale else 1e-6)
