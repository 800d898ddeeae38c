"""MPSDecode, MPSAttention and MPOLinear by their CUDA kernels, against the reference, as on the CPU."""

import itertools

import numpy as np
import pytest
from calls import ids, train
from devices import split
from mps_product_cases import CASES
from test_mps_products import ROUNDING, exact, relative, typed

from qexport.mps.cost import METHODS
from qexport.ops.mpo_linear_ref import mpo_linear_ref
from qexport.ops.mps_attention_ref import mps_attention_ref
from qexport.ops.mps_decode_ref import mps_decode_ref

LARGE = ("large", "many_threes", "tall")  # for the emulation


def products():
    def small(case, method, dtype):
        return case.name not in LARGE and (dtype == "float32" or method == "auto")

    combinations = split(itertools.product(CASES, METHODS, ROUNDING), small)
    halves = ("float16", "bfloat16")  # have no matrix units there
    combinations += [("emulated_sm75", c, "auto", dtype) for c in CASES if c.name not in LARGE for dtype in halves]
    names = ("device", "case", "method", "dtype")
    return pytest.mark.parametrize(names, combinations, ids=lambda v: getattr(v, "name", None), indirect=["device"])


@pytest.mark.parametrize(
    ("device", "case", "dtype"),
    split(itertools.product(CASES, ("float32", "float64")), lambda case, dtype: case.name not in LARGE),
    ids=ids,
    indirect=["device"],
)
def test_decode(device, case, dtype):
    for batch in ((), (3,), (2, 2), (0,)):
        cores, attributes = typed(case.cores(batch), dtype), case.attributes()
        found = train(device, "mps_decode", cores, **attributes)
        want = exact(mps_decode_ref, cores, **attributes)
        assert found.shape == want.shape
        assert relative(found, want) <= ROUNDING[dtype]


@products()
def test_attention(device, case, method, dtype):
    cores, V = (typed(array, dtype) for array in case.attention())
    attributes = case.attributes() | {"method": method}
    found, want = train(device, "mps_attention", cores, V, **attributes), exact(mps_attention_ref, cores, V, **attributes)
    assert found.shape == want.shape
    assert relative(found, want) <= ROUNDING[dtype]


@products()
def test_linear(device, case, method, dtype):
    x, cores, bias = (typed(array, dtype) for array in case.linear())
    attributes = case.attributes() | {"method": method}
    for inputs in ((x, cores, bias), (x, cores)):
        found, want = train(device, "mpo_linear", *inputs, **attributes), exact(mpo_linear_ref, *inputs, **attributes)
        assert found.shape == want.shape
        assert relative(found, want) <= ROUNDING[dtype]


def train_of(rows, cols, row_factors, col_factors, bonds):
    """Attributes, and Gaussian cores whose matrix has entries of about one."""
    shapes = list(zip(bonds[:-1], row_factors, col_factors, bonds[1:], strict=True))
    rng = np.random.default_rng(rows + cols)
    cores = np.concatenate([rng.standard_normal(np.prod(shape)) / shape[0] ** 0.5 for shape in shapes])
    attributes = {"rows": rows, "cols": cols, "row_factors": row_factors, "col_factors": col_factors, "bonds": bonds}
    return attributes, cores


ROUTES = {
    "two_groups": train_of(256, 256, [2] * 8, [2] * 8, [1, 4, 8, 8, 8, 8, 8, 4, 1]),
    "deep_product_in_parts": train_of(256, 250, [4] * 4, [4] * 4, [1, 16, 32, 16, 1]),
    "odd_and_padded": train_of(40, 113, [7, 2, 1, 3], [1, 5, 23, 1], [1, 6, 5, 3, 1]),
    "longer_than_a_chain": train_of(30, 6, [2, 1] * 5 + [1] * 4, [1, 2] * 3 + [1] * 8, [1, *[3] * 13, 1]),
    "bonds_beyond_a_chain": train_of(9, 20, [3, 1, 3, 1], [1, 4, 1, 5], [1, 3, 300, 4, 1]),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_way_to_merge(device, route):
    """Shapes for which a GPU merges sites in other ways than for those above, few of which fill a tile."""
    attributes, cores = ROUTES[route]
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16"):
        small = typed(cores, dtype)
        V = typed(rng.standard_normal((2, attributes["cols"], 3)), dtype)
        x = typed(rng.standard_normal((2, attributes["rows"])), dtype)
        bias = typed(rng.standard_normal(attributes["cols"]), dtype)
        products = [("mps_attention", mps_attention_ref, (small, V)), ("mpo_linear", mpo_linear_ref, (x, small, bias))]
        for name, reference, inputs in products:
            found = train(device, name, *inputs, **attributes, method="auto")
            assert relative(found, exact(reference, *inputs, **attributes)) <= ROUNDING[dtype]
    found = train(device, "mps_decode", cores, **attributes)
    assert relative(found, exact(mps_decode_ref, cores, **attributes)) <= ROUNDING["float64"]


def test_no_tokens(device):
    case = next(c for c in CASES if c.name == "square")
    x, cores, bias = (typed(array, "float32") for array in case.linear())
    found = train(device, "mpo_linear", np.repeat(x[None], 0, 0), cores, bias, **case.attributes(), method="auto")
    assert found.shape == (0, case.cols)
