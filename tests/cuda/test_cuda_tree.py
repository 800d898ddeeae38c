"""Strategies `tree` and `hybrid` by their CUDA kernels, against the reference, as on the CPU."""

from dataclasses import replace

import numpy as np
import pytest
import test_hybrid
import test_tree
from attention_backends import rounded, run_ref
from calls import attention
from devices import split
from test_tree import attributes_of, exact, relative, tiles

from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.quantum_attention_tree_ref import CUDA

SMALL = 100 * 420 * 6  # queries x keys x heads that the emulation takes
FEWEST_QUERIES, FEWEST_KEYS = 1024, 8192  # for which a GPU takes the tree; the emulation takes it for those of test_tree.py


def small(case):
    return case.batch * case.q_heads * case.q_len * (case.past_len + case.kv_len) <= SMALL


def ids(value):
    return getattr(value, "name", None)


def case_on(device, case):
    """The case, with more queries and keys where the device needs them."""
    if device.name == "emulated":
        return case
    nonpad = case.nonpad and tuple(length + FEWEST_KEYS for length in case.nonpad)
    square = case.q_len == case.kv_len and not case.past_len
    q_len = case.q_len + (FEWEST_KEYS if square else FEWEST_QUERIES)
    return replace(case, q_len=q_len, kv_len=case.kv_len + (q_len - case.q_len if square else FEWEST_KEYS), nonpad=nonpad)


def reference_of(feeds, dtype, seed, attributes):
    return run_ref(feeds, dtype, seed, attributes | {"blocks": CUDA})


@pytest.mark.parametrize(("device", "case"), split([(c,) for c in test_tree.CASES], small), ids=ids, indirect=["device"])
def test_tree_is_the_reference(device, case):
    case = case_on(device, case)
    feeds, attributes = case.inputs(), attributes_of(case)
    reference, found = reference_of(feeds, "float32", 5, attributes), attention(device, feeds, "float32", 5, attributes)
    differences = relative(tiles(found["Y"]), tiles(reference["Y"]), axis=-1)
    assert np.mean(differences < 1e-4) >= 0.9, np.sort(differences.ravel())[::-1][:8]
    error = relative(reference["Y"], exact(case, feeds))
    assert 1e-3 < error < 1, "a case in which tree has nothing to do shows nothing"
    np.testing.assert_allclose(relative(found["Y"], exact(case, feeds)), error, rtol=0.05)
    np.testing.assert_allclose(found["error_estimate"], reference["error_estimate"], rtol=0.15, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "past", "grouped_heads"])
def test_tree_of_half_types(device, name, dtype):
    """As far from exact attention as the reference is, with what the type rounds."""
    case = case_on(device, next(c for c in test_tree.CASES if c.name == name))
    feeds, attributes = rounded(case.inputs(), dtype), attributes_of(case)
    reference = reference_of(feeds, dtype, 5, attributes)["Y"]
    found = attention(device, feeds, dtype, 5, attributes)["Y"]
    differences = relative(tiles(found), tiles(reference), axis=-1)
    assert np.mean(differences < {"float16": 2e-3, "bfloat16": 2e-2}[dtype]) >= 0.9
    np.testing.assert_allclose(relative(found, exact(case, feeds)), relative(reference, exact(case, feeds)), rtol=0.05)


@pytest.mark.parametrize(
    ("device", "case"), split([(c,) for c in test_tree.EXACT_CASES], small), ids=ids, indirect=["device"]
)
def test_what_is_no_case_for_tree_is_exact(device, case):
    feeds = case.inputs()
    found = attention(device, feeds, "float32", 0, attributes_of(case))
    np.testing.assert_allclose(found["Y"], exact(case, feeds), rtol=1e-4, atol=1e-5)
    assert (found["error_estimate"] == 0).all()


@pytest.mark.parametrize("precision", QUANTUM_ATTENTION.attribute("precision").choices)
def test_precision_is_a_permission(device, precision):
    case = case_on(device, next(c for c in test_tree.CASES if c.name == "plain"))
    feeds, attributes = case.inputs(), attributes_of(case, precision=precision)
    reference = reference_of(feeds, "float32", 5, attributes)["Y"]
    found = attention(device, feeds, "float32", 5, attributes)["Y"]
    assert relative(found, reference) < 0.05


@pytest.mark.parametrize(("device", "case"), split([(c,) for c in test_hybrid.CASES], small), ids=ids, indirect=["device"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-5), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_hybrid_is_the_reference(device, case, dtype, limit):
    """But for rows where float32 ranks two keys the other way round."""
    if dtype != "float32" and case.mask_kind == "float_padding":
        pytest.skip("the lowest float32 is no number of these types")
    feeds, attributes = rounded(case.inputs(), dtype), test_hybrid.attributes_of(case)
    reference = run_ref(feeds, dtype, 5, attributes)["Y"]
    found = attention(device, feeds, dtype, 5, attributes)["Y"]
    assert np.mean(np.abs(found - reference).max(-1) <= limit * np.abs(reference).max()) >= 0.99
