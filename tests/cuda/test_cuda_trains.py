"""MPSDecode, MPSAttention and MPOLinear by their CUDA kernels, against the reference, as on the CPU."""

import itertools

import numpy as np
import pytest
from calls import train
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
    names = ("device", "case", "method", "dtype")
    return pytest.mark.parametrize(names, combinations, ids=lambda v: getattr(v, "name", None), indirect=["device"])


@pytest.mark.parametrize(
    ("device", "case", "dtype"),
    split(itertools.product(CASES, ("float32", "float64")), lambda case, dtype: case.name not in LARGE),
    ids=lambda value: getattr(value, "name", None),
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


def test_no_tokens(device):
    case = next(c for c in CASES if c.name == "square")
    x, cores, bias = (typed(array, "float32") for array in case.linear())
    found = train(device, "mpo_linear", np.repeat(x[None], 0, 0), cores, bias, **case.attributes(), method="auto")
    assert found.shape == (0, case.cols)
