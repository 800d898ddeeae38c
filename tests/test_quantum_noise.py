"""QuantumNoise: closed form against density matrices, kernel against reference."""

import functools

import numpy as np
import pytest
import torch
from noise_cases import BASES, CHANNELS, name_of, noise_binding, noise_ort, noise_ref, parameters, rows

from qexport.noise import channels, density
from qexport.ops.quantum_noise_ref import as_complex, quantum_noise_ref

BACKENDS = {"binding": noise_binding, "ort": noise_ort}
EXACT = 1e-12  # float64
# An ulp of the type below 1, and what float32 inside leaves.
TOLERANCE = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3, "float64": EXACT}


def global_paulis(rho: torch.Tensor, error: float) -> torch.Tensor:
    """Depolarizing noise of all qubits as one: each of the 4^q - 1 Pauli strings other than the identity, equally likely."""
    qubits = channels.num_qubits(rho.shape[-1])
    strings = functools.reduce(lambda a, b: torch.stack([torch.kron(x, y) for x in a for y in b]), [density.PAULIS] * qubits)
    errors = torch.stack([s @ rho @ s.conj().mT for s in strings[1:]]).sum(0) / (len(strings) - 1)
    return (1 - error) * rho + error * errors


def hadamards(qubits: int) -> torch.Tensor:
    return functools.reduce(torch.kron, [channels.HADAMARD] * qubits)


def by_density_matrix(p: np.ndarray, given: dict, attributes: dict, basis: str) -> np.ndarray:
    """Probabilities of all 2^q states for rows (..., n)."""
    qubits = channels.num_qubits(p.shape[-1])
    padded = torch.nn.functional.pad(torch.from_numpy(p), (0, (1 << qubits) - p.shape[-1]))
    rho = density.density_matrix(padded)
    turn = hadamards(qubits) if basis == "x" else torch.eye(1 << qubits, dtype=torch.complex128)
    channel, convention = attributes["channel"], attributes.get("convention", "replace")
    if attributes.get("scope") == "global":
        level = float(given["level"])
        error = level if convention == "error" else level * (4**qubits - 1) / 4**qubits
        rho = turn @ global_paulis(rho, error) @ turn
    else:
        given = {name: as_complex(value) if name == "kraus" else value for name, value in given.items()}
        kraus = density.kraus_operators(channel, qubits, **given, convention=convention)
        density.check_kraus(kraus)
        if channel == "readout":
            rho = density.apply_kraus(turn @ rho @ turn, kraus)
        else:
            rho = turn @ density.apply_kraus(rho, kraus) @ turn
    return rho.diagonal(dim1=-2, dim2=-1).real.numpy()


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(
    ("case", "n"),
    [
        pytest.param(case, n, id=f"{n}-{name_of(case)}")
        for case in CHANNELS
        for n in (2, 3, 4, 7, 8, 16, 21, 32, 50, 64)
        if n <= 16 or case[0].get("scope") != "global"  # 4^q Pauli strings
    ],
)
def test_closed_form_is_the_density_matrix(case, n, basis):
    """Reference and kernel, with what leaks, for one to six qubits."""
    attributes, per_qubit = case
    p, given = rows(3, n, seed=n), parameters(attributes, per_qubit, n, seed=n)
    want = by_density_matrix(p, given, attributes, basis)
    for run in (noise_ref, noise_binding, noise_ort):
        noisy, leak = run(p, given, {**attributes, "basis": basis})
        assert np.abs(noisy - want[..., :n]).max() <= EXACT, run.__name__
        assert np.abs(leak - want[..., n:].sum(-1)).max() <= EXACT, run.__name__


def test_qubit_k_is_bit_k():
    """Kraus operators per qubit, as one Kronecker product each, the highest qubit first."""
    kraus = density.kraus_operators("amplitude_damping", 3, torch.tensor([0.1, 0.5, 0.9]))
    rho = density.density_matrix(torch.from_numpy(rows(8)))
    want = torch.zeros_like(rho)
    for a in kraus[2]:
        for b in kraus[1]:
            for c in kraus[0]:
                whole = torch.kron(torch.kron(a, b), c)
                want += whole @ rho @ whole.conj().mT
    assert (density.apply_kraus(rho, kraus) - want).abs().max() <= EXACT
    only_first = np.eye(8)[7]  # state 111: damping qubit 0 for certain leaves 110
    noisy, _ = noise_binding(only_first[None], {"level": np.array([1.0, 0, 0])}, {"channel": "amplitude_damping"})
    assert noisy.tolist() == [np.eye(8)[6].tolist()]


def random_state() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    amplitudes = torch.randn(2, dtype=torch.complex128, generator=generator)
    amplitudes /= torch.linalg.vector_norm(amplitudes)
    return torch.outer(amplitudes, amplitudes.conj())


@pytest.mark.parametrize(("convention", "share"), [("replace", 0.3), ("error", 0.4)])
def test_depolarizing_replaces_its_share(convention, share):
    rho = random_state()
    noisy = density.apply_kraus(rho, density.kraus_operators("depolarizing", 1, 0.3, convention=convention))
    assert (noisy - ((1 - share) * rho + share * torch.eye(2, dtype=torch.float64) / 2)).abs().max() <= EXACT


def test_thermal_relaxation_follows_its_times():
    """Populations decay towards equilibrium with T1, coherences with T2, from any state."""
    rho, T1, T2, t, excited = random_state(), 2.0, 3.0, 0.7, 0.2
    noisy = density.apply_kraus(rho, density.kraus_operators("thermal_relaxation", 1, t, T1, T2, excited))
    assert abs(noisy[1, 1] - (excited + (rho[1, 1] - excited) * np.exp(-t / T1))) <= EXACT
    assert abs(noisy[0, 1] - rho[0, 1] * np.exp(-t / T2)) <= EXACT


@pytest.mark.parametrize("unitary", ["none", "hadamard", "gate", "whole"])
def test_any_kraus_operators(unitary):
    """Random channels have no closed form; phases of damped qubits have one in the X basis alone."""
    generator = torch.Generator().manual_seed(1)
    wild = torch.linalg.qr(torch.randn(2, 6, 2, dtype=torch.complex128, generator=generator))[0].reshape(2, 3, 2, 2)
    gate = torch.linalg.qr(torch.randn(2, 2, dtype=torch.complex128, generator=generator))[0]
    whole = torch.linalg.qr(torch.randn(4, 4, dtype=torch.complex128, generator=generator))[0]
    p = torch.from_numpy(rows(5, 4))
    for kraus in (wild, density.kraus_operators("amplitude_damping", 2, 0.3), density.kraus_operators("phase_flip", 2, 0.3)):
        given = {"none": None, "hadamard": channels.HADAMARD, "gate": gate, "whole": whole}[unitary]
        turn = (
            torch.eye(4, dtype=torch.complex128) if given is None else given if len(given) == 4 else torch.kron(given, given)
        )
        rho = turn @ density.apply_kraus(density.density_matrix(p), kraus) @ turn.conj().mT
        want = rho.diagonal(dim1=-2, dim2=-1).real
        assert (density.channel_probabilities(p, kraus, given) - want).abs().max() <= EXACT
    assert density.residual_of(wild) > 0.01
    assert density.residual_of(density.kraus_operators("amplitude_damping", 2, 0.3)) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("renormalize", [0, 1])
@pytest.mark.parametrize("case", CHANNELS, ids=name_of)
def test_kernel_is_the_reference(case, renormalize, basis, backend, dtype):
    attributes, per_qubit = case
    attributes = {**attributes, "basis": basis, "renormalize": renormalize}
    p, given = rows(2, 3, 5, 50), parameters(attributes, per_qubit, 50)
    p[1, 2, 3] = 0  # a query that attends to nothing
    typed = torch.from_numpy(p).to(getattr(torch, dtype))
    given = {name: value.astype(np.float32) for name, value in given.items()}
    want, want_leak = quantum_noise_ref(typed, **given, **attributes)
    noisy, leak = BACKENDS[backend](typed.double().numpy(), given, attributes, dtype)
    assert np.abs(noisy - want.double().numpy()).max() <= TOLERANCE[dtype]
    assert np.abs(leak - want_leak.numpy()).max() <= TOLERANCE["float32"]
    assert not noisy[1, 2, 3].any()
    if renormalize:
        kept = np.delete(noisy.reshape(-1, 50).sum(-1), (1 * 3 + 2) * 5 + 3)
        assert np.abs(kept - 1).max() <= 50 * TOLERANCE[dtype]


def mild(given: dict) -> dict:
    """Noise that leaves at least a half of each qubit's strength: six of them amplify rounding by at most 2^6."""
    return {name: value * (0.25 if name == "level" else 1) for name, value in given.items()}


@pytest.mark.parametrize("run", [noise_ref, noise_binding, noise_ort])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("case", [case for case in CHANNELS if case[0]["channel"] != "kraus"], ids=name_of)
@pytest.mark.parametrize("n", [2, 8, 64])
def test_inverse_takes_the_noise_off(case, basis, n, run):
    """What is left are the probabilities of the same measurement without noise: in basis x no gate comes twice."""
    attributes, per_qubit = case
    attributes = {**attributes, "basis": basis}
    p, given = rows(3, n, seed=n), mild(parameters(attributes, per_qubit, n, seed=n))
    if attributes["channel"] == "thermal_relaxation":
        given["T2"] = given["T1"] = np.ones_like(given["T1"])
    noisy, _ = run(p, given, attributes)
    clean, _ = run(p, {"level": np.array(0.0)}, {"basis": basis})
    found, leak = run(noisy, given, {**attributes, "inverse": 1})
    assert np.abs(found - clean).max() <= 100 * EXACT
    assert not leak.any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("renormalize", [0, 1])
def test_inverse_kernel_is_the_reference(renormalize, basis, backend, dtype):
    """On frequencies, for which nothing says that the result has no numbers below 0."""
    typed = torch.from_numpy(np.eye(50)[[3, 9, 40]] / 2 + np.eye(50)[[7, 9, 41]] / 2).to(getattr(torch, dtype))
    attributes = {"inverse": 1, "basis": basis, "renormalize": renormalize}
    for more, given in (
        ({"channel": "readout"}, {"level": np.array([[0.125, 0.0625]])}),
        ({"channel": "depolarizing", "scope": "global"}, {"level": np.array(0.25)}),
        ({"channel": "amplitude_damping"}, {"level": np.array([0.125, 0, 0.25, 0.5, 0.0625, 0.25])}),
    ):
        want, want_leak = quantum_noise_ref(typed, **given, **attributes, **more)
        noisy, leak = BACKENDS[backend](typed.double().numpy(), given, {**attributes, **more}, dtype)
        assert want.min() < -0.001
        size = max(1.0, float(want.abs().max()))
        assert np.abs(noisy - want.double().numpy()).max() <= 2 * size * TOLERANCE[dtype]
        assert np.abs(leak - want_leak.numpy()).max() <= 2 * size * (EXACT if dtype == "float64" else 1e-6)


@pytest.mark.parametrize("run", [noise_ref, noise_binding, noise_ort])
def test_what_is_left_below_zero_divides_nothing(run):
    """Each of two qubits takes 0 to (3, -2): of the state 0, that makes (9, -6, -6) and 4 that leak."""
    attributes = {"channel": "bit_flip", "inverse": 1, "renormalize": 1}
    noisy, leak = run(np.eye(3)[:2], {"level": np.array(0.4)}, attributes)
    np.testing.assert_allclose(noisy, [[9, -6, -6], np.array([-6, 9, 4]) / 7], atol=1e-12)
    np.testing.assert_allclose(leak, [4, -6], atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("basis", BASES)
def test_threads_do_not_change_the_result(backend, dtype, basis):
    p, attributes = rows(301, 300), {"channel": "amplitude_damping", "basis": basis}  # large enough to be shared out
    one = BACKENDS[backend](p, {"level": np.array(0.1)}, attributes, dtype, threads=1)
    for threads in (2, 3):
        many = BACKENDS[backend](p, {"level": np.array(0.1)}, attributes, dtype, threads=threads)
        assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("run", [noise_ref, noise_binding, noise_ort])
def test_phases_do_not_show_in_the_z_basis(run):
    p = rows(4, 16)
    for channel in ("phase_damping", "phase_flip"):
        noisy, leak = run(p, {"level": np.array(0.4)}, {"channel": channel})
        assert np.array_equal(noisy, p)
        assert not leak.any()


@pytest.mark.parametrize("run", [noise_ref, noise_binding, noise_ort])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("case", [case for case in CHANNELS if not case[1]], ids=name_of)
def test_one_state_needs_no_qubit_and_has_no_noise(case, basis, run):
    attributes = {**case[0], "basis": basis}
    noisy, leak = run(np.array([[1.0], [0.0]]), parameters(*case, 2), attributes)
    np.testing.assert_array_equal(noisy, [[1.0], [0.0]])
    np.testing.assert_array_equal(leak, [0.0, 0.0])


def test_no_rows():
    noisy, leak = noise_ort(np.zeros((0, 3, 8)), {"level": np.array(0.1)}, {})
    assert (noisy.shape, leak.shape) == ((0, 3, 8), (0, 3))


def test_fallback_has_no_noise_and_no_leak():
    p = rows(2, 3, 8)
    noisy, leak = noise_ort(p, {"level": np.array(0.1)}, {}, "float32", fallback=True)
    assert np.array_equal(noisy, p.astype(np.float32))
    assert np.array_equal(leak, np.zeros((2, 3)))
