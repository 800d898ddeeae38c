"""QuantumNoise: what is refused."""

import numpy as np
import pytest
import torch
from noise_cases import noise_binding, noise_ort, noise_ref, rows

from qexport import _core
from qexport.errors import UsageError
from qexport.noise import channels, density
from qexport.ops import QUANTUM_NOISE

GOOD = rows(4, 8)


THERMAL = {"level": np.array(0.1), "T1": np.array(1.0), "T2": np.array(1.0)}


def changed(place, value):
    p = GOOD.copy()
    p[place] = value
    return p


@pytest.mark.parametrize("run", [noise_ref, noise_binding, noise_ort])
@pytest.mark.parametrize(
    ("p", "given", "attributes", "message"),
    [
        (GOOD, {"level": 1.5}, {}, r"level must be in 0 to 1\.33333 with convention replace on 1 qubit, got 1\.5"),
        (
            GOOD,
            {"level": 1.1},
            {"scope": "global"},
            r"level must be in 0 to 1\.01587 with convention replace on 3 qubits, got 1\.1",
        ),
        (GOOD, {"level": [0.1, 0.2, 0.1]}, {"scope": "global"}, r"level must be one number with scope global"),
        (GOOD, {"level": 1.1}, {"convention": "error"}, r"level must be in 0 to 1, got 1\.1"),
        (GOOD, {"level": -0.1}, {"channel": "bit_flip"}, r"level must be in 0 to 1, got -0\.1"),
        (GOOD, {"level": np.nan}, {"channel": "amplitude_damping"}, r"level must be in 0 to 1, got nan"),
        (GOOD, {"level": [0.1, 0.2]}, {}, r"level has shape \(2,\), expected one number or \(3,\), one per qubit"),
        (
            GOOD,
            {"level": np.zeros((2, 2))},
            {"channel": "readout"},
            r"level has shape \(2, 2\), expected one number, \(3,\), \(1, 2\)",
        ),
        (GOOD, {"level": [[0.1, 1.2]]}, {"channel": "readout"}, r"level must be in 0 to 1, got 1\.2"),
        (GOOD, {"level": 0.1}, {"channel": "thermal_relaxation"}, r"T1 is missing; thermal_relaxation needs it"),
        (GOOD, THERMAL | {"T2": 2.5}, {"channel": "thermal_relaxation"}, r"T2 must be at most 2 T1 = 2, got 2\.5"),
        (GOOD, THERMAL | {"T1": 0.0}, {"channel": "thermal_relaxation"}, r"T1 must be > 0, got 0"),
        (
            GOOD,
            THERMAL | {"level": -1},
            {"channel": "thermal_relaxation"},
            r"level must be a time >= 0 with thermal_relaxation, got -1",
        ),
        (
            GOOD,
            THERMAL | {"excited_population": 2},
            {"channel": "thermal_relaxation"},
            r"excited_population must be in 0 to 1, got 2",
        ),
        (GOOD, THERMAL, {"channel": "bit_flip"}, r"T1 is for channel thermal_relaxation, got bit_flip; leave it out"),
        (changed((2, 3), -0.5), {"level": 0.1}, {}, r"probabilities must be >= 0, got -0\.5 at place 3 of row 2"),
        (changed((1, 7), np.nan), {"level": 0.1}, {}, r"probabilities must be >= 0, got nan at place 7 of row 1"),
        (
            changed(3, 0.25),
            {"level": 0.1},
            {},
            r"probabilities must sum to 1 within 1e-09, row 3 is off by 1; divide it by its sum",
        ),
        (changed(0, np.inf), {"level": 0.1}, {}, r"probabilities must sum to 1 within 1e-09, row 0 is off by inf"),
        (np.ones((3, 0)), {"level": 0.1}, {}, r"probabilities must have rows of >= 1 numbers, got rows of 0"),
        (
            GOOD,
            {"level": [0.1, 0.5, 0.1]},
            {"channel": "bit_flip", "inverse": 1},
            r"inverse does not exist: qubit 1 keeps 0 of its state, the least is 1e-06; take another level",
        ),
        (GOOD, {"level": [[0.3, 0.7]]}, {"channel": "readout", "inverse": 1}, r"inverse does not exist: qubit 0 keeps"),
        (GOOD, {"level": 1}, {"channel": "phase_damping", "basis": "x", "inverse": 1}, r"inverse .*: qubit 0 keeps 0 of"),
        (GOOD, {"level": 1}, {"scope": "global", "inverse": 1}, r"inverse does not exist: the register keeps 0 of its"),
        (
            GOOD,
            {"level": 0.1},
            {"channel": "bit_flip", "scope": "global"},
            r"scope must be local with channel bit_flip, got global",
        ),
        (GOOD, {"level": 0.1}, {"channel": "leak"}, r"channel must be one of depolarizing, .*, got 'leak'"),
    ],
)
def test_what_is_refused(run, p, given, attributes, message):
    given = {name: np.asarray(value, np.float64) for name, value in given.items()}
    with pytest.raises(Exception, match=rf"\[QuantumNoise\] {message}") as raised:
        run(p, given, attributes)
    assert "\n" not in str(raised.value).strip()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel": "leak"}, "channel must be one of depolarizing, .*, got 'leak'"),
        ({"scope": "here"}, "scope must be one of local, global, got 'here'"),
        ({"convention": "mine"}, "convention must be one of replace, error, got 'mine'"),
        ({"basis": "y"}, "basis must be one of z, x, got 'y'"),
        ({"inverse": -1}, "inverse must be one of 0, 1, got -1"),
        ({"renormalize": 2}, "renormalize must be one of 0, 1, got 2"),
        ({"channel": "readout", "convention": "error"}, "convention must be replace with channel readout, got error"),
    ],
)
def test_the_kernel_checks_attributes_too(change, message):
    """As a node made by hand could have them."""
    with pytest.raises(ValueError, match=rf"\[QuantumNoise\] {message}"):
        _core.quantum_noise(GOOD, 0.1, **QUANTUM_NOISE.resolve({}) | change)


def test_more_that_is_refused():
    with pytest.raises(ValueError, match=r"\[QuantumNoise\] probabilities must have at most 4 dimensions, got 5"):
        noise_binding(rows(1, 1, 1, 1, 2), {"level": 0.1}, {})
    with pytest.raises(UsageError, match=r"\[QuantumNoise\] probabilities must have 1 to 4 dimensions, got 5"):
        noise_ref(rows(1, 1, 1, 1, 2), {"level": 0.1}, {})
    with pytest.raises(ValueError, match=r"\[QuantumNoise\] probabilities must be float32, .*, got int64"):
        _core.quantum_noise(np.ones((2, 2), np.int64), 0.1, **QUANTUM_NOISE.resolve({}))
    with pytest.raises(UsageError, match=r"Kraus operators must sum to the identity within 1e-10, they are off by 0\.19"):
        density.channel_probabilities(torch.from_numpy(GOOD), 0.9 * torch.eye(2, dtype=torch.complex128).expand(3, 1, 2, 2))
    with pytest.raises(UsageError, match="readout acts on outcomes and has no coherence"):
        channels.coherence("readout", 3, 0.1)
