"""Mitigation against other packages: mitiq for extrapolation and error cancellation, Stim for the repetition code."""

import numpy as np
import pytest
import torch
from noise_cases import rows

from qexport.noise.measured import MeasuredNoise, measured
from qexport.noise.mitigation import ErrorCancellation, RepetitionCode, ZeroNoiseExtrapolation, mitigated
from qexport.noise.model import NoiseModel
from qexport.noise.quasi import gamma, quasi_probabilities


@pytest.mark.parametrize("scales", [(1, 2, 3), (1, 3), (1.0, 1.5, 2.5, 4.0)], ids=str)
@pytest.mark.parametrize("shots", [None, 500])
def test_extrapolation_is_mitiqs(shots, scales):
    """On the same results, with and without shot noise."""
    inference = pytest.importorskip("mitiq.zne.inference")
    p = torch.from_numpy(rows(2, 8))
    method, noise = ZeroNoiseExtrapolation(scales), MeasuredNoise([NoiseModel("amplitude_damping", 0.1)], 8)
    results = [
        measured(experiment.rows(p), experiment.shots, 7, layer)
        for layer, experiment in enumerate(method.experiments(noise, shots))
    ]
    want = [
        inference.RichardsonFactory.extrapolate(scales, values)
        for values in torch.stack(results, -1).reshape(-1, len(scales)).tolist()
    ]
    assert np.abs(mitigated(method, noise, p, shots, 7).numpy().ravel() - want).max() <= 1e-12


@pytest.mark.parametrize("level", [0.01, 0.2])
def test_quasi_probabilities_are_mitiqs(level):
    """Of depolarizing noise, whose level mitiq counts as PennyLane does, and of amplitude damping."""
    representations = pytest.importorskip("mitiq.pec.representations")
    damping = pytest.importorskip("mitiq.pec.representations.damping")
    cirq = pytest.importorskip("cirq")
    gate = cirq.Circuit(cirq.I(cirq.LineQubit(0)))
    noise = MeasuredNoise([NoiseModel("depolarizing", level, convention="error")], 2)
    (eta,) = quasi_probabilities(noise).numpy()
    want = representations.represent_operation_with_local_depolarizing_noise(gate, level)
    assert np.abs(eta - [*want.coeffs, 0]).max() <= 1e-12
    assert abs(ErrorCancellation().overhead(noise) - want.norm**2) <= 1e-12 * want.norm**2
    want = damping._represent_operation_with_amplitude_damping_noise(gate, level)
    eta = quasi_probabilities(MeasuredNoise([NoiseModel("amplitude_damping", level)], 2))
    assert abs(float(gamma(eta)) - want.norm) <= 1e-12


@pytest.mark.parametrize("distance", [3, 5, 7, 9])
def test_repetition_code_is_stims(distance):
    """A million shots of a depolarized code word, decoded by majority: within five standard deviations, as Stim's draws
    change with its version; and as many draws of ours, within three."""
    stim = pytest.importorskip("stim")
    error, shots = 0.15, 1_000_000
    noise = MeasuredNoise([NoiseModel("depolarizing", error, convention="error")], 2)
    (experiment,) = RepetitionCode(distance).experiments(noise, shots)
    rates = experiment.rows(torch.eye(2, dtype=torch.float64))[[0, 1], [1, 0]].tolist()
    for state, rate in enumerate(rates):
        qubits = " ".join(map(str, range(distance)))
        circuit = stim.Circuit(f"{'X' if state else 'I'} {qubits}\nDEPOLARIZE1({error}) {qubits}\nM {qubits}")
        bits = circuit.compile_sampler(seed=distance).sample(shots)
        wrong = np.mean((bits.sum(-1) > distance / 2) != bool(state))
        assert abs(wrong - rate) < 5 * np.sqrt(rate * (1 - rate) / shots)
        truth = torch.eye(2, dtype=torch.float64)[state : state + 1]
        ours = float(mitigated(RepetitionCode(distance), noise, truth, shots, seed=distance)[0, 1 - state])
        assert abs(ours - rate) < 3 * np.sqrt(rate * (1 - rate) / shots)
