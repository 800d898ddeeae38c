"""The noise ops as functions of torch: values, gradients, tracing, and in a converted model."""

import nn_zoo
import numpy as np
import onnx
import pytest
import torch
from noise_cases import CHANNELS, name_of, noise_ref, parameters, rows
from test_nn_convert import ATOL, assert_close, feeds, run_torch

from qexport.conversion import convert
from qexport.errors import UsageError
from qexport.nn import exact_attention, quantum_measure, quantum_noise, quantum_overlap
from qexport.runtime import session

OPERATORS = torch.ops.qexport


def leaf(x):
    return torch.as_tensor(x).clone().requires_grad_()


@pytest.mark.parametrize("case", CHANNELS, ids=name_of)
@pytest.mark.parametrize("basis", ["z", "x"])
def test_noise_is_the_op_and_has_its_gradient(case, basis):
    attributes, per_qubit = case
    attributes = {**attributes, "basis": basis}
    p, given = rows(3, 6, seed=1), parameters(attributes, per_qubit, 6, seed=2)
    noisy, leak = quantum_noise(torch.from_numpy(p), **given, **attributes)
    for got, want in zip((noisy, leak), noise_ref(p, given, attributes), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    # away from rows with zeros, where basis x has a kink, and from the limits of a parameter
    p = torch.from_numpy(p) * 0.9 + 0.1 / 6
    given["level"] = 0.1 + 0.8 * given["level"]
    # a step of the check would make Kraus operators that are no channel
    inputs = [leaf(p), *(torch.as_tensor(x) if name == "kraus" else leaf(x) for name, x in given.items())]

    def run(p, *values):
        return quantum_noise(p / p.sum(-1, keepdim=True), **dict(zip(given, values, strict=True)), **attributes)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("channel", ["bit_flip", "amplitude_damping"])
def test_a_row_of_zeros_is_divided_by_nothing(channel):
    """That of a query which attends to no key: its gradient is a number."""
    p = leaf(torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]))
    quantum_noise(p, 0.1, channel=channel, renormalize=1)[0].square().sum().backward()
    assert p.grad[0].isfinite().all()
    assert (p.grad[1] == 0).all()


def test_overlap_has_the_gradient_of_its_closed_form():
    q, k, level = leaf(torch.randn(3, 8).double()), leaf(torch.randn(4, 8).double()), leaf(torch.tensor(0.2).double())
    for channel in ("phase_damping", "amplitude_damping"):
        assert torch.autograd.gradcheck(lambda *x, channel=channel: quantum_overlap(*x, channel=channel), (q, k, level))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_state_of_zeros_overlaps_with_nothing_and_has_a_gradient(scope):
    """That of padding, which must not reach the weights in front of it."""
    q = leaf(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    found = quantum_overlap(q, torch.randn(3, 4), 0.1, scope=scope)
    assert (found[1] == 0).all()
    found.sum().backward()
    assert q.grad[0].abs().sum() > 0
    assert (q.grad[1] == 0).all()


def test_exact_attention_has_the_gradient_of_the_identity():
    p, level, g = leaf(torch.tensor([[0.5, 0.5, 0.0]])), leaf(torch.tensor(0.1)), torch.tensor([1.0, 2.0, 3.0])
    with exact_attention():
        noisy, leak = quantum_noise(p, level)
        ((quantum_measure(noisy, 1) * g).sum() + leak.sum()).backward()
    assert p.grad.tolist() == [[1.0, 2.0, 3.0]]
    assert level.grad == 0


def test_a_row_of_one_number_has_a_gradient():
    p = leaf(torch.ones(3, 1))
    sum(x.sum() for x in quantum_noise(p, 0.1)).backward()
    assert p.grad.tolist() == [[1.0]] * 3


def test_a_measurement_passes_on_an_unbiased_gradient():
    """Mean over seeds of the gradient of (f . g) is g, within five standard errors; an outcome never found has none."""
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64)
    g = torch.tensor([1.0, -2.0, 3.0, 5.0], dtype=torch.float64)
    found = []
    for seed in range(2000):
        x = leaf(p)
        (quantum_measure(x, seed, shots=16) * g).sum().backward()
        found.append(x.grad[0])
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - g)[:3].abs() <= 5 * error[:3]).all()
    assert (found[:, 3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_keep_torchs_contract(dtype):
    """Beside rows that are not contiguous, and a level of another type than theirs."""
    p = leaf(torch.from_numpy(rows(2, 3, 6)).transpose(0, 1).to(dtype))
    level = leaf(torch.tensor(0.1, dtype=dtype if dtype == torch.float64 else torch.float32))
    torch.library.opcheck(OPERATORS.quantum_measure.default, (p, torch.tensor(1), 5, 0))
    noise = "depolarizing", "local", "replace", "z", 0, 0
    torch.library.opcheck(OPERATORS.quantum_noise.default, (p, level, *[None] * 5, *noise))
    torch.library.opcheck(OPERATORS.quantum_overlap.default, (p, p.detach()[:, :1], level, *[None] * 4, *noise[:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype):
    p = torch.from_numpy(rows(2, 8)).to(dtype)
    noisy, leak = quantum_noise(p, 0.1)
    assert noisy.dtype == dtype
    assert leak.dtype == torch.float32
    assert quantum_measure(noisy, 1, shots=9).dtype == dtype
    assert quantum_overlap(p, p, 0.1).dtype == dtype


def test_compiled_is_eager():
    module, inputs, _ = nn_zoo.noisy()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, want in zip(compiled(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_converted_model_measures_what_torch_measures(tmp_path):
    """With the library as in torch, at the same seeds; without it, and in the classical model, there is no noise."""
    report = convert("nn_zoo:noisy", tmp_path / "bundle")
    assert report.left_alone == []
    module, inputs, _ = nn_zoo.noisy()
    folder = tmp_path / "bundle"
    nodes = onnx.load(folder / "model.onnx").graph.node
    assert [node.op_type for node in nodes if node.domain == "com.qexport"].count("QuantumNoise") == 2
    given = feeds(folder, inputs)
    assert_close(session(folder / "model.onnx").run(None, given), run_torch(module, inputs))
    with exact_attention():
        exact = run_torch(module, inputs)
    assert_close(session(folder / "model.onnx", library=False).run(None, given), exact)
    assert_close(session(folder / "classical.onnx", library=False).run(None, given), exact)
    leak = exact[1]
    assert (leak == 0).all()
    assert np.abs(run_torch(module, inputs)[0] - exact[0]).max() > 100 * ATOL


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: quantum_noise(p, 2.0), r"level must be in 0 to 1.33333 .*, got 2"),
        (lambda p: quantum_noise(p + 0.1, 0.1), r"must sum to 1 within 1e-09, row 0 is off by 0.6; divide it by its sum"),
        (lambda p: quantum_noise(p, 0.1, channel="rays"), r"channel must be one of depolarizing, .*, got 'rays'"),
        (lambda p: quantum_measure(p, shots=0), r"shots must be >= 1, got 0"),
        (lambda p: quantum_overlap(p, p[:, :3], 0.1), r"keys"),
        (lambda p: quantum_noise(p.numpy(), 0.1), r"probabilities must be a torch\.Tensor, got numpy\.ndarray; give torch"),
        (lambda p: quantum_measure(p.tolist()), r"probabilities must be a torch\.Tensor, got list"),
        (lambda p: quantum_overlap(p.numpy(), p, 0.1), r"queries must be a torch\.Tensor"),
        (lambda p: quantum_overlap(p, p.numpy(), 0.1), r"keys must be a torch\.Tensor"),
        (lambda p: quantum_noise(p, "much"), r"level must be a number or a tensor, got 'much'"),
        (lambda p: quantum_noise(p, None), r"level must be a number or a tensor, got None"),
        (
            lambda p: quantum_noise(p, 0.1, T1={}, T2=1.0, channel="thermal_relaxation"),
            r"T1 must be a number or a tensor, got {}",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call(torch.from_numpy(rows(2, 6)))
