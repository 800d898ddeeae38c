"""overlap_probabilities: <b|E(|a><a|)|b> in closed form and by density matrices."""

import pytest
import torch

from qexport.errors import UsageError
from qexport.noise.channels import coherence
from qexport.noise.density import apply_kraus, kraus_operators, overlap_probabilities

EXACT = 1e-12
THERMAL = {"T1": 1.0, "T2": 1.3, "excited_population": 0.2}
CHANNELS = ("depolarizing", "amplitude_damping", "phase_damping", "thermal_relaxation", "bit_flip", "phase_flip")


def states(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    amplitudes = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return amplitudes / torch.linalg.vector_norm(amplitudes, dim=-1, keepdim=True)


def kraus_of(channel: str, qubits: int) -> torch.Tensor:
    levels = torch.linspace(0.1, 0.8, qubits, dtype=torch.float64)
    return kraus_operators(channel, qubits, levels, **(THERMAL if channel == "thermal_relaxation" else {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("channel", [*CHANNELS, "phases", "random"])
@pytest.mark.parametrize("qubits", [1, 3])
def test_overlaps_are_those_of_the_density_matrix(qubits, channel, dtype):
    """Pair by pair, also for diagonal operators with phases, whose factors are complex, and operators of no channel's."""
    d = 1 << qubits
    if channel == "phases":
        angles = 6 * states(qubits, 3, 2)
        kraus = torch.diag_embed(torch.polar(torch.full_like(angles, 3**-0.5), angles))
    elif channel == "random":
        kraus = torch.linalg.qr(states(qubits, 6, 2, dtype=torch.complex128))[0].unflatten(1, (3, 2))
    else:
        kraus = kraus_of(channel, qubits)
    a, b = states(2, 3, d, dtype=dtype), states(2, 5, d, dtype=dtype, seed=1)
    got = overlap_probabilities(a, b, kraus)
    assert got.shape == (2, 3, 5)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)):
        batch, query, key = place.tolist()
        one, other = a[batch, query].to(torch.complex128), b[batch, key].to(torch.complex128)
        rho = apply_kraus(torch.outer(one, one.conj()), kraus)
        want = other.conj() @ rho @ other
        assert abs(got[batch, query, key] - want) <= EXACT


@pytest.mark.parametrize("channel", ["phase_damping", "phase_flip"])
def test_dephasing_goes_from_the_square_of_the_sum_to_the_sum_of_squares(channel):
    a, b = states(3, 8), states(4, 8, seed=1)
    w = a[:, None] * b
    none, all_of_it = (kraus_operators(channel, 3, level) for level in (0.0, 0.5 if channel == "phase_flip" else 1.0))
    assert (overlap_probabilities(a, b, none) - w.sum(-1).square()).abs().max() <= EXACT
    assert (overlap_probabilities(a, b, all_of_it) - w.square().sum(-1)).abs().max() <= EXACT
    c = coherence(channel, 3, 0.3)[0]
    distance = torch.tensor([[(i ^ j).bit_count() for i in range(8)] for j in range(8)])
    want = torch.einsum("mki,ij,mkj->mk", w, c**distance, w)
    assert (overlap_probabilities(a, b, kraus_operators(channel, 3, 0.3)) - want).abs().max() <= EXACT


@pytest.mark.parametrize("channel", CHANNELS)
def test_overlaps_have_gradients(channel):
    level = torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True)
    a, b = states(2, 4).requires_grad_(), states(3, 4, seed=1).requires_grad_()
    more = THERMAL if channel == "thermal_relaxation" else {}

    def overlaps(a, b, level):
        return overlap_probabilities(a, b, kraus_operators(channel, 2, level, **more))

    assert torch.autograd.gradcheck(overlaps, (a, b, level))


def test_what_is_refused():
    kraus = kraus_of("bit_flip", 2)
    with pytest.raises(UsageError, match="states must have 4 amplitudes for 2 qubits, got 4 and 8"):
        overlap_probabilities(states(1, 4), states(1, 8), kraus)
    with pytest.raises(UsageError, match=r"Kraus operators must sum to the identity within 1e-10, they are off by 0\.19"):
        overlap_probabilities(states(1, 4), states(1, 4), 0.9 * torch.eye(2, dtype=torch.complex128).expand(2, 1, 2, 2))
