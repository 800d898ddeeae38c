"""Mitigation of measured rows: exact in its limits, its errors as theory says, and what is refused."""

import functools
import itertools

import numpy as np
import pytest
import torch
from noise_cases import BASES, NAMED, name_of, parameters, rows
from scipy.stats import binom, chi2

from qexport.errors import UsageError
from qexport.noise import channels, density
from qexport.noise.comparison import METHODS, compare_mitigation
from qexport.noise.measured import MeasuredNoise, measured
from qexport.noise.methods import majority, project_on_simplex
from qexport.noise.mitigation import (
    ErrorCancellation,
    Mitigation,
    ReadoutInversion,
    RepetitionCode,
    ZeroNoiseExtrapolation,
    mitigated,
    parse_mitigation,
)
from qexport.noise.model import NoiseModel, parse_noise
from qexport.noise.quasi import quasi_probabilities

EXACT = 1e-12
CASES = [pytest.param(*case, id=name_of(case)) for case in NAMED]
SHOT_COUNTS = (3, 4, 32, 1000)


def model_of(attributes: dict, per_qubit: bool, n: int) -> NoiseModel:
    """Weak enough to be inverted: a third of the random level."""
    given = {name: torch.from_numpy(np.asarray(value)) for name, value in parameters(attributes, per_qubit, n).items()}
    return NoiseModel(**attributes, **given | {"level": given["level"] / 3})


def tensor(*shape, seed=0):
    return torch.from_numpy(rows(*shape, seed=seed))


@pytest.mark.parametrize("n", [8, 50])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("attributes", "per_qubit"), CASES)
def test_inversion_and_cancellation_are_exact_without_shot_noise(attributes, per_qubit, basis, n):
    p, noise = tensor(3, n), MeasuredNoise([model_of(attributes, per_qubit, n)], n, basis)
    truth = noise.noiseless(p)
    assert (mitigated(ReadoutInversion(), noise, p, None) - truth).abs().max() <= EXACT
    if attributes["channel"] != "readout" and attributes.get("scope") != "global":
        assert (mitigated(ErrorCancellation(), noise, p, None) - truth).abs().max() <= EXACT


@pytest.mark.parametrize("basis", BASES)
def test_sequences_of_models_are_the_density_matrix(basis):
    models = parse_noise(
        "amplitude_damping:0.2,depolarizing:0.1,phase_damping:0.3,thermal_relaxation:0.4:T2=0.7,readout:0.05"
    )
    p, noise = tensor(3, 8), MeasuredNoise(models, 8, basis)
    rho = density.density_matrix(p)
    for model in models[:-1]:
        rho = density.apply_kraus(rho, density.kraus_operators(model.channel, 3, **model.inputs))
    turn = functools.reduce(torch.kron, [channels.HADAMARD] * 3) if basis == "x" else torch.eye(8, dtype=rho.dtype)
    want = (turn @ rho @ turn).diagonal(dim1=-2, dim2=-1).real
    want = channels.apply_transitions(want, channels.transition_matrices("readout", 3, 0.05))
    assert (noise.probabilities(p) - want).abs().max() <= EXACT
    assert (mitigated(ReadoutInversion(), noise, p, None) - noise.noiseless(p)).abs().max() <= EXACT


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("channel", ["depolarizing", "amplitude_damping", "phase_flip", "thermal_relaxation"])
def test_noise_times_k_is_the_channel_k_times(channel, basis):
    p, noise = tensor(2, 8), MeasuredNoise([NoiseModel(channel, 0.2)], 8, basis)
    kraus = density.kraus_operators(channel, 3, **noise.channels[0].inputs)
    rho = density.density_matrix(p)
    for _ in range(3):
        rho = density.apply_kraus(rho, kraus)
    turn = functools.reduce(torch.kron, [channels.HADAMARD] * 3) if basis == "x" else torch.eye(8, dtype=rho.dtype)
    want = (turn @ rho @ turn).diagonal(dim1=-2, dim2=-1).real
    assert (noise.through(p, noise.repeated(3)) - want).abs().max() <= EXACT
    half = noise.repeated(1.5)
    assert (noise.through(p, [*half, *half]) - want).abs().max() <= EXACT, "powers that are no whole numbers"


def test_readout_is_repeated_behind_the_channels():
    """As many times, at the measurement: what a device can do."""
    noise = MeasuredNoise(parse_noise("amplitude_damping:0.2,readout:0.1"), 8)
    models = noise.repeated_models(2)
    assert [model.channel for model in models] == ["amplitude_damping"] * 2 + ["readout"] * 2
    p = tensor(2, 8)
    want = MeasuredNoise(models, 8).probabilities(p)
    assert (noise.through(p, noise.repeated(2)) - want).abs().max() <= EXACT
    half = noise.repeated(1.5)
    want = noise.through(noise.through(p, [half[0], half[0]]), [half[1], half[1]])
    assert (noise.through(p, noise.repeated(3)) - want).abs().max() <= EXACT


def test_extrapolation_removes_the_first_orders():
    """What stays is (1 - s)^3 for each factor s that noise puts on a Walsh coefficient."""
    level, n = 0.1, 8
    p, noise = tensor(1, n), MeasuredNoise([NoiseModel("depolarizing", level)], n)
    weight = torch.tensor([bin(j).count("1") for j in range(n)], dtype=torch.float64)
    left = 1 - (1 - (1 - level) ** weight) ** 3
    want = channels.walsh_hadamard(channels.walsh_hadamard(p) * left)
    assert (mitigated(ZeroNoiseExtrapolation(), noise, p, None) - want).abs().max() <= EXACT
    assert np.allclose(ZeroNoiseExtrapolation().coefficients, (3, -3, 1), atol=1e-15)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("channel", ["depolarizing", "amplitude_damping", "phase_damping", "thermal_relaxation", "bit_flip"])
def test_cancellation_is_the_average_over_operations(channel, basis):
    """P(sign, outcome) by density matrices, over all 25 pairs of operations on two qubits."""
    given = {"T2": 0.9, "excited_population": 0.3} if channel == "thermal_relaxation" else {}
    noise = MeasuredNoise([NoiseModel(channel, 0.3, **given)], 4, basis)
    p, eta = tensor(1, 4), quasi_probabilities(noise)
    one = torch.eye(2, dtype=torch.complex128)
    reset = torch.stack([one[:1].T @ one[:1], one[:1].T @ one[1:]])
    operations = [*(pauli[None] for pauli in density.PAULIS), reset]
    kraus = density.kraus_operators(channel, 2, **noise.channels[0].inputs)
    turn = torch.kron(channels.HADAMARD, channels.HADAMARD) if basis == "x" else torch.eye(4, dtype=torch.complex128)
    want = {1: 0, -1: 0}
    for a, b in itertools.product(range(5), repeat=2):
        rho = density.density_matrix(p)
        for qubit, operation in ((0, a), (1, b)):
            both = [one[None], one[None]]
            both[qubit] = operations[operation]
            whole = torch.stack([torch.kron(y, x) for x in both[0] for y in both[1]])
            rho = (whole @ rho[:, None] @ whole.conj().mT).sum(1)
        rho = turn @ density.apply_kraus(rho, kraus) @ turn
        weight = eta[0, a] * eta[1, b]
        want[1 if weight > 0 else -1] += weight.abs() * rho.diagonal(dim1=-2, dim2=-1).real
    total = eta.abs().sum(-1).prod()
    (experiment,) = ErrorCancellation().experiments(noise, 100)
    assert (experiment.rows(p) - torch.cat([want[1], want[-1]], -1) / total).abs().max() <= EXACT
    assert abs(ErrorCancellation().overhead(noise) - total**2) <= EXACT * total**2


@pytest.mark.parametrize("distance", [1, 3, 31, 999])
def test_majority_is_the_tail_of_a_binomial(distance):
    rates = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert np.abs(majority(rates, distance).numpy() - binom.sf(distance // 2, distance, rates.numpy())).max() <= 1e-10


def test_costs_in_closed_form():
    level, q = 0.1, 6
    noise = MeasuredNoise([NoiseModel("depolarizing", level)], 1 << q)
    overheads = {text: parse_mitigation(text).overhead(noise) for text in METHODS}
    assert overheads["none"] == overheads["repetition:3"] == 1
    assert overheads["pec"] == pytest.approx(((1 + level / 2) / (1 - level)) ** (2 * q), rel=EXACT)
    assert overheads["readout_inversion"] == pytest.approx((1 / (1 - level)) ** (2 * q), rel=EXACT)
    assert overheads["zne"] == pytest.approx(49, rel=EXACT)
    assert [parse_mitigation(text).qubits(noise) for text in ("none", "repetition:5")] == [6, 30]
    damping = MeasuredNoise([NoiseModel("amplitude_damping", level)], 2)
    assert ErrorCancellation().overhead(damping) == pytest.approx(((1 + level) / (1 - level)) ** 2, rel=EXACT)
    whole = MeasuredNoise([NoiseModel("depolarizing", level, scope="global")], 16)
    inverse = (torch.eye(16) - level / 16) / (1 - level)
    assert ReadoutInversion().overhead(whole) == pytest.approx(float(inverse.abs().sum(0).max()) ** 2, rel=1e-6)


@pytest.mark.parametrize("shots", SHOT_COUNTS)
@pytest.mark.parametrize("text", METHODS)
def test_shots_are_shared_out_and_not_multiplied(text, shots):
    noise = MeasuredNoise([NoiseModel("depolarizing", 0.1)], 8)
    parts = [experiment.shots for experiment in parse_mitigation(text).experiments(noise, shots)]
    assert sum(parts) == shots
    assert min(parts) >= 1


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("noise", ["depolarizing:0.1", "amplitude_damping:0.2", "depolarizing:0.05,readout:0.03"])
def test_variance_is_theirs_within_five_percent(noise, basis):
    """Measured over runs against theory, for every method that applies. The runs are enough for the test to be sharp."""
    found = compare_mitigation(tensor(1, 12, seed=3), parse_noise(noise), 64, basis=basis, runs=20000, seed=5)
    assert len(found) >= 4
    for error in found:
        if error.method == "readout_inversion:project":
            assert np.isnan(error.variance)
            continue
        assert error.standard_error * 5 < 0.05 * error.mse, "sharp enough"
        assert abs(error.measured_mse - error.mse) < 5 * error.standard_error, error
        assert abs(error.measured_variance / error.variance - 1) < 0.05, error
        if error.method in ("readout_inversion", "pec"):
            assert error.bias2 < EXACT


def test_projection_trades_variance_for_a_bias():
    plain, projected = compare_mitigation(
        tensor(2, 16), NoiseModel("readout", 0.1), 50, methods=("readout_inversion", "readout_inversion:project"), runs=4000
    )
    assert plain.measured_mse - projected.measured_mse > 5 * (plain.standard_error + projected.standard_error)
    assert projected.measured_bias2 > 5 * projected.measured_variance / 4000, "no chance: that is its spread without a bias"
    x = torch.tensor([[0.7, 0.5, -0.1], [0.2, 0.3, 0.5]], dtype=torch.float64)
    assert (project_on_simplex(x) - torch.tensor([[0.6, 0.4, 0], [0.2, 0.3, 0.5]])).abs().max() <= 1e-7


def test_comparison_is_at_equal_shots_and_leaves_out_what_does_not_apply():
    damped = compare_mitigation(tensor(8), NoiseModel("amplitude_damping", 0.1), 2, runs=10)
    assert [error.method for error in damped] == ["none", "readout_inversion", "readout_inversion:project", "pec"]
    flat = compare_mitigation(tensor(8), NoiseModel("phase_flip", 0.1), 8, runs=10, methods=("none",))
    assert flat[0].bias2 == 0, "phases do not show in the basis z"


@pytest.mark.parametrize("method", [Mitigation(), ErrorCancellation(), RepetitionCode(5)], ids=str)
def test_draws_follow_their_distribution(method):
    """Chi-square over rows alike. The null hypothesis: outcomes have the probabilities of the experiment."""
    noise = MeasuredNoise([NoiseModel("depolarizing", 0.3)], 8, kernel=True)
    (experiment,) = method.experiments(noise, 100)
    w = experiment.rows((tensor(1, 8) + 1 / 8) / 2)
    draws = measured(w.expand(5000, -1).contiguous(), 100, 3, kernel=True) * 100
    observed, expected = draws.sum(0), w[0] * 5000 * 100
    used = expected > 5
    assert not observed[expected == 0].any()
    assert chi2.sf(float(((observed - expected)[used] ** 2 / expected[used]).sum()), int(used.sum()) - 1) > 1e-3


GOOD = NoiseModel("depolarizing", 0.1)


@pytest.mark.parametrize(
    ("mitigation", "noise", "message"),
    [
        ("repetition:3", NoiseModel("amplitude_damping", 0.1), "repetition corrects flips .*, got amplitude_damping; take"),
        ("repetition", NoiseModel("phase_flip", 0.1), "repetition corrects flips .*, got phase_flip; take"),
        (
            "repetition",
            NoiseModel("depolarizing", 0.1, scope="global"),
            "repetition takes noise of single qubits, got scope",
        ),
        (
            "readout_inversion",
            NoiseModel("depolarizing", 1.0),
            r"inverse does not exist: qubit 0 keeps 0 of its state, the least is 1e-06; take another level",
        ),
        (
            "readout_inversion",
            NoiseModel("bit_flip", 0.5),
            r"inverse does not exist: qubit 0 keeps 0 of its state, the least is 1e-06; take another level",
        ),
        (
            "readout_inversion",
            NoiseModel("depolarizing", 1.0, scope="global"),
            "inverse does not exist: the register keeps 0 of its state",
        ),
        ("pec", NoiseModel("depolarizing", 1.0), "pec cannot undo .* take a lower level"),
        ("pec", NoiseModel("phase_damping", 1.0), "pec cannot undo .* take a lower level"),
        ("pec", NoiseModel("readout", 0.1), "pec undoes noise of states, and readout acts on outcomes; take"),
        ("pec", NoiseModel("depolarizing", 0.1, scope="global"), "pec takes noise of single qubits, got scope global"),
        ("zne:1-1.5-2", NoiseModel("bit_flip", 0.9), "noise that turns outcomes over .*, got 1.5 times"),
        ("repetition:4", GOOD, "repetition distance must be an odd number in 1 to 999, got 4"),
        ("repetition:x", GOOD, r"mitigation must be one of none, .*, got 'repetition:x'"),
        ("zne:2-2", GOOD, "zne scales must be two or more different numbers above 0 and up to 100, got 2-2"),
        ("zne:1-inf", GOOD, "zne scales must be .* up to 100, got 1-inf"),
        ("zne:1-nan", GOOD, "zne scales must be .* up to 100, got 1-nan"),
        ("repetition:1001", GOOD, "repetition distance must be an odd number in 1 to 999, got 1001"),
        ("prayer", GOOD, r"mitigation must be one of none, readout_inversion\[:project\], .*, got 'prayer'"),
        ("none:3", GOOD, "mitigation must be one of none, .*, got 'none:3'"),
    ],
)
def test_what_is_refused(mitigation, noise, message):
    with pytest.raises(UsageError, match=message) as raised:
        mitigated(parse_mitigation(mitigation), MeasuredNoise([noise], 8), tensor(8), 100)
    assert "\n" not in str(raised.value)


def test_more_that_is_refused():
    with pytest.raises(UsageError, match="zne with 3 scales needs at least 3 shots, got 2"):
        mitigated(ZeroNoiseExtrapolation(), MeasuredNoise([GOOD], 8), tensor(8), 2)
    with pytest.raises(UsageError, match="repetition protects no phase: basis must be z, got x"):
        mitigated(RepetitionCode(), MeasuredNoise([GOOD], 8, "x"), tensor(8), 2)
    with pytest.raises(UsageError, match="readout acts on what was measured and must come last, got depolarizing behind it"):
        MeasuredNoise([NoiseModel("readout", 0.1), GOOD], 8)
    both = MeasuredNoise([NoiseModel("depolarizing", 0.1, scope="global"), GOOD], 8)
    with pytest.raises(UsageError, match=r"noise of 2 steps can be repeated whole times alone, got 1\.5 times"):
        mitigated(ZeroNoiseExtrapolation((1, 1.5)), both, tensor(8), 100)
    with pytest.raises(UsageError, match="shots must be >= 1, got 0"):
        compare_mitigation(tensor(8), GOOD, 0)
    with pytest.raises(UsageError, match="runs must be >= 2, got 1"):
        compare_mitigation(tensor(8), GOOD, 10, runs=1)
    with pytest.raises(UsageError, match="probabilities must sum to 1"):
        compare_mitigation(torch.ones(8), GOOD, 10)


@pytest.mark.parametrize("text", [*METHODS, "zne:1-1.5-3", "repetition:7"])
def test_text_and_back(text):
    assert str(parse_mitigation(text)) == text
