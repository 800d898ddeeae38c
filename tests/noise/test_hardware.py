"""Rows as circuits: what they prepare, what Qiskit and PennyLane measure of them, devices, OpenQASM 3, what is refused."""

import numpy as np
import pennylane as qml
import pytest
import qiskit.qasm3
import torch
from noise_cases import rows
from qiskit.primitives import StatevectorSampler
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit.quantum_info import Statevector
from qiskit.transpiler import CouplingMap

from qexport.errors import UsageError
from qexport.hardware import pennylane as on_pennylane
from qexport.hardware import qiskit as on_qiskit
from qexport.hardware import to_qasm3
from qexport.hardware.circuit import preparation, rotations
from qexport.nn import exact_attention, quantum_attention
from qexport.nn.backends import get_backend
from qexport.noise.channels import num_qubits, walsh_hadamard
from qexport.noise.model import NoiseModel
from qexport.ops.quantum_noise_ref import quantum_noise_ref

BACKENDS = ("qiskit", "pennylane")
EXACT = 1e-12
SHOTS = 100_000


def padded(p: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(p, (0, (1 << num_qubits(p.shape[-1])) - p.shape[-1]))


def total_variation(found: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    return (found - want).abs().sum(-1) / 2


def statistical_bound(p: torch.Tensor, shots: int, samples: int = 1) -> torch.Tensor:
    """What the total variation of frequencies from p stays below, 5 standard deviations above its mean, as the draws change
    with the packages; with two samples, that of one from the other. Their differences are near to normal; the absolute
    values of two normal numbers of correlation r have the covariance 2 / pi (r asin r + sqrt(1 - r^2) - 1) sigma sigma'."""
    covariance = (torch.diag_embed(p) - p[..., :, None] * p[..., None, :]) * samples / shots
    sigma = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    products = sigma[..., :, None] * sigma[..., None, :]
    r = (covariance / products.clamp(min=1e-30)).clamp(-1, 1)
    variance = (2 / np.pi * (r * torch.asin(r) + (1 - r * r).sqrt() - 1) * products).sum((-1, -2)) / 4
    return (2 / np.pi) ** 0.5 * sigma.sum(-1) / 2 + 5 * variance.sqrt()


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16, 21, 50, 64, 100, 200])
def test_the_circuit_prepares_the_row(n):
    """Real amplitudes sqrt(p), by 2^q - 1 RY and 2^q - 2 CX, the same gates in both packages."""
    qubits = num_qubits(n)
    p = torch.from_numpy(rows(4, n))
    p[3] = torch.eye(n)[n - 1]  # divisions of nothing on the way
    want, angles = padded(p).sqrt().numpy(), rotations(p).numpy()
    circuit = on_qiskit.row_circuit(qubits).remove_final_measurements(inplace=False)
    assert dict(circuit.count_ops()) == {
        name: count for name, count in (("ry", 2**qubits - 1), ("cx", 2**qubits - 2)) if count
    }
    for row, row_angles in zip(want, angles, strict=True):
        assert np.abs(Statevector(circuit.assign_parameters(row_angles)).data - row).max() <= EXACT

    @qml.qnode(qml.device("default.qubit", wires=qubits))
    def prepared():
        on_pennylane.row_circuit(angles, list(reversed(range(qubits))))
        return qml.state()

    assert np.abs(prepared() - want).max() <= EXACT


PER_QUBIT = torch.tensor([0.02, 0.3, 0.1, 0.05, 0.2, 0.15], dtype=torch.float64)
NOISES = {
    "none": NoiseModel(level=0.0),
    "depolarizing": NoiseModel("depolarizing", PER_QUBIT),
    "depolarizing_error": NoiseModel("depolarizing", 0.1, convention="error"),
    "amplitude_damping": NoiseModel("amplitude_damping", PER_QUBIT),
    "phase_damping": NoiseModel("phase_damping", 0.2),
    "thermal_relaxation": NoiseModel("thermal_relaxation", 0.2, 1 + PER_QUBIT, 2 * PER_QUBIT + 0.3, 0.1),
    "thermal_relaxation_long_T2": NoiseModel("thermal_relaxation", 0.2, 1 + PER_QUBIT, 1.5 + PER_QUBIT),
    "bit_flip": NoiseModel("bit_flip", PER_QUBIT),
    "phase_flip": NoiseModel("phase_flip", 0.2),
    "readout": NoiseModel("readout", torch.stack([PER_QUBIT, PER_QUBIT.flip(0)], -1)),
}


@pytest.mark.parametrize("basis", ["z", "x"])
@pytest.mark.parametrize("name", NOISES)
def test_both_packages_measure_the_closed_form(name, basis):
    """6 qubits, each with noise of its own, with and without states that stand for nothing; and one package the other."""
    model = NOISES[name]
    for n in (50, 64):
        p = torch.from_numpy(rows(2, n, seed=n))
        want, _ = quantum_noise_ref(padded(p), **model.inputs, **model.attributes, basis=basis)
        found = [get_backend(b).measure_rows(p, SHOTS, (model,), basis=basis, seed=n) for b in BACKENDS]
        bound = statistical_bound(want, SHOTS)
        assert bound.max() < 0.02
        for f in found:
            assert (total_variation(f, want[:, :n]) <= bound).all()
            leak, wanted_leak = 1 - f.sum(-1), want[:, n:].sum(-1)
            assert ((leak - wanted_leak).abs() <= 5 * (wanted_leak * (1 - wanted_leak) / SHOTS).sqrt() + 1e-9).all()
        between = statistical_bound(want, SHOTS, samples=2)
        assert between.max() < 0.025
        assert (total_variation(*found) <= between).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_act_one_after_the_other(backend):
    noise = (NoiseModel("bit_flip", 0.4), NoiseModel("amplitude_damping", 0.5), NoiseModel("readout", 0.1))
    p = torch.from_numpy(rows(2, 11))
    want = padded(p)
    for model in noise:
        want, _ = quantum_noise_ref(want, **model.inputs, **model.attributes)
    found = get_backend(backend).measure_rows(p, SHOTS, (*noise, NoiseModel("readout", 0.0)), seed=1)
    assert (total_variation(found, want[:, :11]) <= statistical_bound(want, SHOTS)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convention", ["replace", "error"])
def test_all_qubits_as_one(backend, convention):
    model = NoiseModel("depolarizing", 0.5, scope="global", convention=convention)
    p = torch.from_numpy(rows(2, 11))
    want, _ = quantum_noise_ref(padded(p), **model.inputs, **model.attributes)
    found = get_backend(backend).measure_rows(p, SHOTS, (model,), seed=1)
    assert (total_variation(found, want[:, :11]) <= statistical_bound(want, SHOTS)).all()


@pytest.mark.parametrize("noise", [(), (NoiseModel("bit_flip", 0.1),)], ids=["ideal", "noisy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_draw_by_themselves_and_seeds_repeat(backend, noise):
    measure = get_backend(backend).measure_rows
    p = torch.full((2, 3, 8), 1 / 8, dtype=torch.float32)
    p[1, 2] = 0  # a query that attends to nothing
    first = measure(p, 100, noise, seed=5)
    assert (first.shape, first.dtype) == (p.shape, p.dtype)
    assert torch.allclose(first * 100, (first * 100).round(), atol=1e-4)
    assert torch.equal(first, measure(p, 100, noise, seed=5))
    assert not torch.equal(first, measure(p, 100, noise, seed=6))
    assert len({tuple(row.tolist()) for row in first.reshape(6, 8)}) == 6
    assert not first[1, 2].any()
    assert torch.equal(measure(torch.ones(2, 1), 10), torch.ones(2, 1))  # one key needs no qubit
    assert measure(torch.zeros(0, 5), 10).shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("three_d", [False, True])
def test_attention(backend, three_d):
    """Grouped heads with different numbers of shots, causal: each output within 5 standard deviations of the exact one."""
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(2, h, 9, 4, generator=generator) for h in (4, 2, 2))
    settings = {"is_causal": 1}
    given = Q, K, V
    if three_d:
        given = tuple(x.transpose(1, 2).flatten(2) for x in given)
        settings |= {"q_num_heads": 4, "kv_num_heads": 2}
    shots = [500, 500, 2000, 2000]
    sampled = {"strategy": "naive", "num_samples": shots, "backend": backend, "seed": 3}
    exact, weights = quantum_attention(*given, strategy="exact", need_weights=True, **settings)
    found, found_weights = quantum_attention(*given, need_weights=True, **sampled, **settings)
    assert torch.allclose(found_weights, weights, atol=1e-6)
    values = V.repeat_interleave(2, 1)
    mean = weights @ values
    sigma = ((weights @ values.square() - mean.square()).clamp(min=0) / torch.tensor(shots)[:, None, None]).sqrt()
    sigma = sigma.transpose(1, 2).flatten(2) if three_d else sigma
    assert ((found - exact).abs() <= 5 * sigma + 1e-6).all()
    assert torch.equal(quantum_attention(*given, **sampled, **settings), found)
    assert not torch.equal(quantum_attention(*given, **sampled, **settings, layer=1), found)
    with exact_attention():
        assert torch.allclose(quantum_attention(*given, **sampled, **settings), exact, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Qiskit backend .* has no QubitProperties")
def test_a_device_of_qiskit():
    """A line of qubits with other gates than ours: circuits are transpiled, outcomes stay in our order."""
    device = GenericBackendV2(
        7, basis_gates=["sx", "rz", "cz"], coupling_map=CouplingMap.from_line(7), noise_info=False, seed=1
    )
    device.set_options(seed_simulator=1)  # the seed above is of the device, not of its draws
    p = torch.from_numpy(rows(3, 21))
    for basis, want in (("z", padded(p)), ("x", walsh_hadamard(padded(p).sqrt()).square())):
        found = on_qiskit.QiskitBackend(device).measure_rows(p, SHOTS, basis=basis)
        assert (total_variation(found, want[:, :21]) <= statistical_bound(want, SHOTS)).all()
    noisy = GenericBackendV2(5, seed=1)  # with errors of its own
    found = on_qiskit.QiskitBackend(noisy).measure_rows(p, SHOTS)
    assert (total_variation(found, p) > 2 * statistical_bound(p, SHOTS)).all()


def test_a_sampler_of_qiskit():
    p = torch.from_numpy(rows(3, 21))
    found = on_qiskit.QiskitBackend(sampler=StatevectorSampler(seed=1)).measure_rows(p, SHOTS)
    assert (total_variation(found, p) <= statistical_bound(p, SHOTS)).all()


@pytest.mark.parametrize("wires", [["f", "e", "d", "c", "b", "a"], 6, None])
def test_a_device_of_pennylane(wires):
    p = torch.from_numpy(rows(3, 21))
    found = on_pennylane.PennyLaneBackend(qml.device("default.qubit", wires=wires, seed=1)).measure_rows(p, SHOTS)
    assert (total_variation(found, p) <= statistical_bound(p, SHOTS)).all()


@pytest.mark.parametrize("basis", ["z", "x"])
@pytest.mark.parametrize("n", [2, 3, 21, 64])
def test_qasm_and_back(n, basis):
    """The text, read by Qiskit, gives the same probabilities, qubit for qubit; noise is a comment of it."""
    (p,) = torch.from_numpy(rows(1, n))
    noise = (NoiseModel("amplitude_damping", 0.1), NoiseModel("readout", 0.02))
    text = to_qasm3(p, noise, basis=basis)
    circuit = qiskit.qasm3.loads(text)
    assert circuit.num_qubits == circuit.num_clbits == num_qubits(n)
    measured = [(circuit.find_bit(i.qubits[0]).index, circuit.find_bit(i.clbits[0]).index) for i in circuit.data if i.clbits]
    assert measured == [(k, k) for k in range(num_qubits(n))]
    found = Statevector(circuit.remove_final_measurements(inplace=False)).probabilities()
    want = padded(p) if basis == "z" else walsh_hadamard(padded(p).sqrt()).square()
    assert np.abs(found - want.numpy()).max() <= EXACT
    lines = text.splitlines()
    damping = lines.index("// noise on every qubit: channel amplitude_damping, level 0.1")
    assert lines[damping - 1].startswith(("ry", "cx"))
    assert lines[-2:] == ["c = measure q;", "// wrong outcomes: channel readout, level 0.02"]
    assert to_qasm3(p, basis=basis).splitlines() == [line for line in lines if not line.startswith("//")]


def test_gates_are_counted_up():
    gates = list(preparation(4))
    assert [gate.angle for gate in gates if gate.control is None] == list(range(15))


P = torch.full((2, 32), 1 / 32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("p", "shots", "noise", "basis", "message"),
    [
        (P, 10, (), "y", "basis must be one of z, x, got 'y'"),
        (P, 0, (), "z", "shots must be >= 1, got 0"),
        (P, 1.5, (), "z", r"shots must be a whole number, got 1\.5"),
        (2 * P, 10, (), "z", r"\[hardware\] probabilities must sum to 1 within 0\.0001, row 0 is off by 1"),
        (P, 10, (NoiseModel("bit_flip", 2.0),), "z", r"level must be in 0 to 1, got 2"),
        (
            P,
            10,
            (NoiseModel("readout", 0.1), NoiseModel("bit_flip", 0.1)),
            "z",
            "readout acts on what was measured and must come last, got bit_flip behind it",
        ),
        (P, 10, (NoiseModel(level=0.1, scope="global"),), "z", "scope global is simulated on up to 4 qubits here, got 5"),
        (
            P,
            10,
            (NoiseModel(level=torch.arange(5) / 9, scope="global"),),
            "z",
            "level must be one number with scope global, got one per qubit that differ",
        ),
        (torch.full((1, 8192), 1 / 8192), 10, (NoiseModel(),), "z", "noise is simulated on up to 12 qubits here, got 13"),
    ],
)
def test_what_is_refused(backend, p, shots, noise, basis, message):
    with pytest.raises(UsageError, match=message) as raised:
        get_backend(backend).measure_rows(p, shots, noise, basis=basis)
    assert "\n" not in str(raised.value)


def test_more_that_is_refused():
    Q = torch.randn(1, 1, 3, 4)
    for backend in BACKENDS:
        with pytest.raises(
            UsageError, match=f"backend {backend} measures strategy naive with dropout_p 0, got tree with 0;"
        ):
            quantum_attention(Q, Q, Q, strategy="tree", backend=backend)
        with pytest.raises(UsageError, match=r"got naive with 0\.5;"):
            quantum_attention(Q, Q, Q, strategy="naive", dropout_p=0.5, backend=backend)
    for device in (
        on_qiskit.QiskitBackend(GenericBackendV2(5, seed=1)),
        on_pennylane.PennyLaneBackend(qml.device("default.qubit", wires=5)),
    ):
        with pytest.raises(UsageError, match="a device has noise of its own, got bit_flip; leave noise out"):
            device.measure_rows(P, 10, (NoiseModel("bit_flip", 0.1),))
    for device in (
        on_qiskit.QiskitBackend(GenericBackendV2(4, seed=1)),
        on_pennylane.PennyLaneBackend(qml.device("default.qubit", wires=4)),
    ):
        with pytest.raises(UsageError, match="rows of 5 qubits need a device with as many, got 4; take a larger one"):
            device.measure_rows(P, 10)
    with pytest.raises(UsageError, match="probabilities must have 1 axis, got 2; give one row at a time"):
        to_qasm3(P)
    with pytest.raises(UsageError, match="basis must be one of z, x, got 'overlap'"):
        to_qasm3(P[0], basis="overlap")
