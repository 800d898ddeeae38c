"""QuantumAttention by its CUDA kernels, of calls that fill tiles of queries, against the float64 reference."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from attention_backends import DTYPES, rounded, run_ref
from attention_cases import PADDING, Case
from calls import SEED, attention, ids
from test_ops import TOLERANCE, allowed_flips, assert_close

# More queries than one tile has, for every multiprocessor of the smaller emulated card, in heads that matrix units take:
# blocks of keys that are whole, cut, hidden and split between the past and the new ones, and tiles with one block and none.
FULL_TILES = (
    Case("whole_blocks", 1, 4, 4, q_len=256, kv_len=384, head_size=64, v_head_size=64),
    Case("cut_blocks", 2, 4, 2, q_len=130, kv_len=333, head_size=48, v_head_size=56),
    Case("causal", 1, 4, 2, q_len=300, kv_len=300, head_size=64, v_head_size=40, attributes={"is_causal": 1}),
    Case("past", 1, 4, 4, q_len=150, kv_len=150, past_len=277, head_size=64, v_head_size=64, attributes={"is_causal": 1}),
    Case("wide", 1, 4, 1, q_len=140, kv_len=500, head_size=128, v_head_size=128),
    Case("wide_causal", 1, 4, 4, q_len=260, kv_len=260, head_size=80, v_head_size=128, attributes={"is_causal": 1}),
    Case(
        "window",
        1,
        4,
        4,
        q_len=300,
        kv_len=300,
        head_size=64,
        v_head_size=64,
        attributes={"left_window_size": 70, "is_causal": 1},
    ),
    Case("nonpad", 4, 2, 2, q_len=129, kv_len=260, head_size=64, v_head_size=64, nonpad=(0, 128, 131, 260)),
    Case(
        "softcap_negative",
        1,
        4,
        4,
        q_len=130,
        kv_len=200,
        head_size=64,
        v_head_size=64,
        attributes={"softcap": 2.0, "scale": -0.3},
    ),
    Case("mask", 1, 4, 4, q_len=130, kv_len=150, head_size=40, v_head_size=24, mask=("h", "q", "kv")),
    Case("hidden_keys", 2, 2, 2, q_len=70, kv_len=200, head_size=32, v_head_size=72, mask=PADDING, mask_kind="bool"),
    Case("packed_heads", 1, 8, 1, q_len=9, kv_len=90, head_size=20, v_head_size=36),
    Case("split_keys", 1, 1, 1, q_len=40, kv_len=600, head_size=64, v_head_size=32),
)


# `times` as large a batch: on an H200 the queries then fill tiles of which warpgroups share the queries, two warpgroups have
# one, or three (exact_choice_test.cc). In float32, sm_86 has the code of the emulated Hopper.
EMULATED = {"emulated": DTYPES, "emulated_large": DTYPES, "emulated_sm75": DTYPES, "emulated_sm86": ("float16", "bfloat16")}
on_each_tile = pytest.mark.parametrize(
    ("device", "dtype", "times"),
    [
        *((device, dtype, 1) for device, dtypes in EMULATED.items() for dtype in dtypes),
        *(pytest.param("gpu", dtype, times, marks=pytest.mark.gpu) for dtype in DTYPES for times in (5, 10, 25)),
    ],
    indirect=["device"],
)


@on_each_tile
@pytest.mark.parametrize("case", FULL_TILES, ids=ids)
def test_exact_in_full_tiles(device, dtype, times, case):
    case = replace(case, batch=case.batch * times, nonpad=case.nonpad and case.nonpad * times)
    feeds, attributes = rounded(case.inputs(), dtype), case.all_attributes(strategy="exact")
    want = run_ref(feeds, dtype, 0, attributes)["Y"]
    assert_close(attention(device, feeds, dtype, 0, attributes)["Y"], want, dtype, "Y")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("batch", "q_heads", "queries"), [(7, 20, 60), (1, 8, 3200)])
def test_tiles_beyond_a_full_wave(gpu, batch, q_heads, queries, dtype, size):
    """With 132 multiprocessors the keys of the last tiles, of 60 or 192 queries, are cut, as in exact_parts_test.cc."""
    case = Case("last_wave", batch, q_heads, q_heads // 2, queries, kv_len=2000, head_size=size, v_head_size=size)
    feeds, attributes = rounded(case.inputs(), dtype), case.all_attributes(strategy="exact")
    want = run_ref(feeds, dtype, 0, attributes)["Y"]
    assert_close(attention(gpu, feeds, dtype, 0, attributes)["Y"], want, dtype, "Y")


@on_each_tile
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("most", [15, 500])
def test_scores_that_rise_from_block_to_block(device, dtype, times, most, size):
    """Their maximum moves; by 500 at once no float32 holds a weight that is relative to the one before."""
    feeds = Case("rising", times, 4, 4, q_len=200, kv_len=300, head_size=size, v_head_size=size).inputs()
    feeds["Q"], scale = np.abs(feeds["Q"]), np.abs(feeds["Q"]).sum(-1).max()
    # Row j of K is the same in all elements, so that queries score it 0 to `most`.
    rise = np.linspace(-most, most, 300).round(-1 if most > 100 else 0)
    feeds["K"][:] = (rise / scale)[:, None] + 0.02 / scale * feeds["K"]
    feeds, attributes = rounded(feeds, dtype), {"strategy": "exact", "scale": 1.0}
    want = run_ref(feeds, dtype, 0, attributes)["Y"]
    # A sum of so many products in float32 is rounded by about 2^-24 of it, times their root, and a weight by as much.
    limit = max(TOLERANCE[dtype], most * 2.0**-24 * size**0.5)
    np.testing.assert_allclose(attention(device, feeds, dtype, 0, attributes)["Y"], want, 0, limit * np.abs(want).max())


# What the tiles of `stratified` and `adaptive` meet beside those: keys that fill no part of a tile, and every kind of mask.
few_keys = partial(Case, batch=2, q_heads=4, kv_heads=2, q_len=40, kv_len=77, head_size=32, v_head_size=24)
SWEPT_TILES = (
    few_keys("one_key", kv_len=1),
    few_keys("peaked", attributes={"scale": 1.5}),
    few_keys("float_mask", mask=("b", "h", "q", "kv")),
    few_keys("bool_mask_causal", mask=("b", 1, "q", "kv"), mask_kind="bool", attributes={"is_causal": 1}),
    few_keys("nothing_allowed", mask=("q", "kv"), mask_kind="none_allowed"),
    few_keys("nonpad_window", nonpad=(70, 0), attributes={"left_window_size": 50}),
    few_keys("3d_past", three_d=True, past_len=41, head_size=72, v_head_size=128),
)


@pytest.mark.parametrize("control_variate", [0, 1])
@pytest.mark.parametrize("strategy", ["stratified", "adaptive"])
@pytest.mark.parametrize("case", [*FULL_TILES, *SWEPT_TILES], ids=ids)
def test_sampled_in_full_tiles(device, case, strategy, control_variate):
    """Scores are computed once for every pass over the keys; heads have more and fewer samples than a row's list holds."""
    dtype = "bfloat16" if control_variate else "float16"
    feeds = rounded(case.inputs(), dtype)
    samples = ([45, 20] * case.q_heads)[: case.q_heads]
    attributes = case.all_attributes(strategy=strategy, num_samples=samples, control_variate=control_variate, layer=3)
    want = run_ref(feeds, dtype, SEED, attributes)["Y"]
    flips = allowed_flips(case.batch * case.q_heads * case.q_len, 45, case.past_len + case.kv_len)
    assert_close(attention(device, feeds, dtype, SEED, attributes)["Y"], want, dtype, "Y", flips)
