"""QuantumNoise with Kraus operators and unitaries, against density matrices."""

import numpy as np
import pytest
import torch
from instruction_sets import ISAS, run_on
from noise_cases import (
    CHANNELS,
    isometries,
    name_of,
    noise_binding,
    noise_ort,
    noise_ref,
    parameters,
    random_kraus,
    rows,
)

from qexport.noise import density
from qexport.noise.channels import num_qubits
from qexport.ops.quantum_noise_ref import as_complex, quantum_noise_ref

BACKENDS = {"binding": noise_binding, "ort": noise_ort}
RUNS = (noise_ref, noise_binding, noise_ort)
EXACT = 1e-12
HADAMARD = np.stack([np.array([[1, 1], [1, -1]]) / 2**0.5, np.zeros((2, 2))], -1)


def unitary_of(kind: str, n: int) -> np.ndarray:
    d = {"gate": 2, "whole": 1 << num_qubits(n)}[kind]
    return isometries(d, d, seed=n)


def by_density_matrix(p: np.ndarray, given: dict, attributes: dict) -> np.ndarray:
    """Probabilities of all 2^q states for rows (..., n): the channel, then the unitary; readout behind it."""
    qubits = num_qubits(p.shape[-1])
    rho = density.density_matrix(torch.nn.functional.pad(torch.from_numpy(p), (0, (1 << qubits) - p.shape[-1])))
    unitary = as_complex(given["unitary"])
    if len(unitary) == 2:
        gate, unitary = unitary, torch.ones(1, 1, dtype=torch.complex128)
        for _ in range(qubits):
            unitary = torch.kron(gate, unitary)
    if attributes.get("scope") == "global":
        strength = float(given["level"]) / (1 if attributes["convention"] == "replace" else 1 - 4.0**-qubits)
        trace = rho.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        mixed = torch.eye(1 << qubits, dtype=torch.float64) * trace / (1 << qubits)
        rho = unitary @ ((1 - strength) * rho + strength * mixed) @ unitary.mH
        return rho.diagonal(dim1=-2, dim2=-1).real.numpy()
    inputs = {name: as_complex(x) if name == "kraus" else x for name, x in given.items() if name != "unitary"}
    kraus = density.kraus_operators(
        attributes["channel"], qubits, **inputs, convention=attributes.get("convention", "replace")
    )
    if attributes["channel"] == "readout":
        rho = density.apply_kraus(unitary @ rho @ unitary.mH, kraus)
    else:
        rho = unitary @ density.apply_kraus(rho, kraus) @ unitary.mH
    return rho.diagonal(dim1=-2, dim2=-1).real.numpy()


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{name_of(case)}-{kind}")
        for case in CHANNELS
        for kind in ("gate", "whole")
        if (case[0]["channel"], kind) != ("readout", "whole")  # refused
    ],
)
@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 16, 21, 50, 64, 128])
def test_unitaries_are_those_of_the_density_matrix(case, kind, n):
    """The kernel measures each qubit along a direction of its own behind a gate, and has a density matrix behind a unitary
    of all qubits; both give what the whole matrices give."""
    attributes, per_qubit = case
    p, given = rows(3, n, seed=n), parameters(attributes, per_qubit, n, seed=n)
    given["unitary"] = unitary_of(kind, n)
    want = by_density_matrix(p, given, attributes)
    for run in RUNS if n <= 64 else RUNS[1:]:
        noisy, leak = run(p, given, attributes)
        assert np.abs(noisy - want[..., :n]).max() <= EXACT, run.__name__
        assert np.abs(leak - want[..., n:].sum(-1)).max() <= EXACT, run.__name__
        assert noisy.min() >= 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gate", "whole"])
def test_unitaries_in_other_types(kind, backend, dtype):
    p = rows(2, 5, 50)
    p[1, 2] = 0
    typed = torch.from_numpy(p).to(getattr(torch, dtype))
    tolerance = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    for channel in ("kraus", "amplitude_damping", "depolarizing"):
        attributes = {"channel": channel, "renormalize": 1}
        given = {**parameters(attributes, True, 50), "unitary": unitary_of(kind, 50)}
        given = {name: value.astype(np.float32) for name, value in given.items()}
        want, want_leak = quantum_noise_ref(typed, **given, **attributes)
        noisy, leak = BACKENDS[backend](typed.double().numpy(), given, attributes, dtype)
        assert np.abs(noisy - want.double().numpy()).max() <= tolerance
        assert np.abs(leak - want_leak.numpy()).max() <= 1e-6
        assert not noisy[1, 2].any()


ON_AN_ISA = """
from test_noise_operators import *
for case in CHANNELS:
    if case[0]["channel"] != "readout":
        for n in (2, 4, 8, 16, 50, 128):
            test_unitaries_are_those_of_the_density_matrix(case, "whole", n)
test_unitaries_in_other_types("whole", "binding", "float32")
print("done")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees(isa):
    assert run_on(isa, ON_AN_ISA) == "done\n"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["gate", "whole"])
def test_threads_do_not_change_the_result(backend, dtype, kind):
    p = rows(301, 50)
    given = {"level": np.array(1.0), "kraus": random_kraus(), "unitary": unitary_of(kind, 50)}
    given = {name: value.astype(dtype) for name, value in given.items()}
    one = BACKENDS[backend](p, given, {"channel": "kraus"}, dtype, threads=1)
    many = BACKENDS[backend](p, given, {"channel": "kraus"}, dtype, threads=3)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_basis_x_is_a_hadamard_gate(run):
    p = rows(4, 16)
    for channel in ("amplitude_damping", "phase_flip", "bit_flip"):
        want, _ = run(p, {"level": np.array(0.3)}, {"channel": channel, "basis": "x"})
        noisy, _ = run(p, {"level": np.array(0.3), "unitary": HADAMARD}, {"channel": channel})
        assert np.abs(noisy - want).max() <= EXACT


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("basis", ["z", "x"])
def test_operators_of_a_named_channel_are_that_channel(basis, run):
    """At level 1, and half of the time at 1/2: then outcomes are the mean of those with and without."""
    p = rows(4, 8)
    for channel in ("amplitude_damping", "bit_flip", "phase_damping"):
        operators = density.kraus_operators(channel, 1, 0.3)[0]
        kraus = torch.view_as_real(operators).numpy()
        want, _ = run(p, {"level": np.array(0.3)}, {"channel": channel, "basis": basis})
        given = {"level": np.array(1.0), "kraus": kraus}
        noisy, _ = run(p, given, {"channel": "kraus", "basis": basis})
        assert np.abs(noisy - want).max() <= EXACT
        back, _ = run(noisy, given, {"channel": "kraus", "basis": basis, "inverse": 1})
        clean, _ = run(p, {"level": np.array(0.0)}, {"basis": basis})
        assert np.abs(back - clean).max() <= EXACT
        some, _ = run(p, given | {"level": np.array([0.5, 0, 0])}, {"channel": "kraus", "basis": basis})
        one, _ = run(p, given | {"level": np.array([1.0, 0, 0])}, {"channel": "kraus", "basis": basis})
        assert np.abs(some - (one + clean) / 2).max() <= EXACT


GOOD = rows(4, 8)
KRAUS = {"level": 1.0, "kraus": random_kraus()}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("p", "given", "attributes", "message"),
    [
        (GOOD, {"level": 1.0}, {"channel": "kraus"}, r"kraus is missing; channel kraus needs it"),
        (GOOD, KRAUS, {}, r"kraus is for channel kraus, got depolarizing; leave it out"),
        (GOOD, KRAUS | {"level": 1.5}, {"channel": "kraus"}, r"level must be in 0 to 1, got 1\.5"),
        (
            GOOD,
            KRAUS | {"kraus": 0.9 * HADAMARD[None]},
            {"channel": "kraus"},
            r"Kraus operators must sum to the identity within 1e-10, they are off by 0\.19",
        ),
        (
            GOOD,
            KRAUS | {"kraus": np.full((1, 2, 2, 2), np.nan)},
            {"channel": "kraus"},
            r"Kraus operators must sum to the identity within 1e-10, they are off by nan",
        ),
        (
            GOOD,
            KRAUS | {"kraus": random_kraus(2)},
            {"channel": "kraus"},
            r"kraus has shape \(2, 3, 2, 2, 2\), expected \(operators, 2, 2, 2\) or \(3, operators, 2, 2, 2\), real and",
        ),
        (GOOD, KRAUS | {"kraus": np.zeros((0, 2, 2, 2))}, {"channel": "kraus"}, r"kraus has shape \(0, 2, 2, 2\), expected"),
        (
            GOOD,
            {"level": 0.1, "unitary": 1.1 * HADAMARD},
            {},
            r"unitary must be one within 1e-10, U\^dagger U is off the identity by 0\.21",
        ),
        (
            GOOD,
            {"level": 0.1, "unitary": 1.1 * HADAMARD},
            {"channel": "readout"},
            r"unitary must be one within 1e-10, U\^dagger U is off the identity by 0\.21",
        ),
        (
            GOOD,
            {"level": 0.1, "unitary": isometries(8, 8) * np.linspace(1, 1.1, 8)[:, None, None]},
            {},
            r"unitary must be one within 1e-10, U\^dagger U is off the identity by 0\.\d+",
        ),
        (
            GOOD,
            {"level": 0.1, "unitary": np.full((8, 8, 2), np.nan)},
            {},
            r"unitary must be one within 1e-10, U\^dagger U is off the identity by nan",
        ),
        (
            GOOD,
            {"level": 0.1, "unitary": isometries(4, 4)},
            {},
            r"unitary has shape \(4, 4, 2\), expected \(2, 2, 2\) or \(8, 8, 2\), real and imaginary parts last",
        ),
        (GOOD, {"level": 0.1, "unitary": HADAMARD}, {"basis": "x"}, r"basis must be z with a unitary, got x; multiply"),
        (GOOD, {"level": 0.1, "unitary": HADAMARD}, {"inverse": 1}, r"inverse takes noise off outcomes, which have no unit"),
        (
            GOOD,
            {"level": 0.1, "unitary": isometries(8, 8)},
            {"channel": "readout"},
            r"unitary of all qubits is behind the channel, and readout behind it; give it a node of its own",
        ),
        (
            GOOD,
            KRAUS,
            {"channel": "kraus", "inverse": 1},
            r"inverse needs a channel that acts on outcomes alone, coherences add up to 0\.\d+ to those of .*qubit",
        ),
    ],
)
def test_what_is_refused(run, p, given, attributes, message):
    given = {name: np.asarray(value, np.float64) for name, value in given.items()}
    with pytest.raises(Exception, match=rf"\[QuantumNoise\] {message}") as raised:
        run(p, given, attributes)
    assert "\n" not in str(raised.value).strip()


@pytest.mark.parametrize("run", RUNS[1:])
def test_unitaries_of_many_qubits_are_refused(run):
    p = np.eye(1, 4097)
    with pytest.raises(
        Exception, match=r"a density matrix, which takes 268 MB of double a thread for 12 qubits, the most, got 13; a gate"
    ):
        run(p, {"level": np.array(0.1), "unitary": isometries(4, 4)}, {})
    noisy, _ = run(p, {"level": np.array(0.1), "unitary": HADAMARD}, {})
    assert np.abs(noisy - 2.0**-13).max() <= EXACT
