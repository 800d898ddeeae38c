"""Rows where keys that are certain to be taken use the whole budget up, and keys of vanishing probability are left over."""

import numpy as np
import pytest
from attention_backends import run_binding, run_ref


@pytest.mark.parametrize("control_variate", [0, 1])
@pytest.mark.parametrize("strategy", ["stratified", "adaptive", "hybrid"])
def test_leftovers_do_not_matter(strategy, control_variate):
    """Two keys share all the probability but e^-60, two samples: both are taken, and the result is exact."""
    Q = np.zeros((1, 1, 1, 4), np.float32)
    K = np.zeros((1, 1, 4, 4), np.float32)
    Q[..., 0], K[0, 0, 2:, 0] = 1, -120  # scores 0, 0, -60, -60
    V = np.random.default_rng(0).standard_normal((1, 1, 4, 4), dtype=np.float32)
    attributes = {"strategy": strategy, "num_samples": (2,), "control_variate": control_variate}
    feeds = {"Q": Q, "K": K, "V": V}
    exact = run_ref(feeds, "float32", 0, {"strategy": "exact"})["Y"]
    np.testing.assert_allclose(run_ref(feeds, "float32", 0, attributes)["Y"], exact, atol=1e-6)
    np.testing.assert_allclose(run_binding(feeds, "float32", 0, attributes)["Y"], exact, atol=1e-6)
