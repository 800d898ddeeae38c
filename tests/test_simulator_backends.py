"""QuantumAttentionSimulator on backends that measure."""

import pytest
import torch
from scipy.stats import chi2
from simulator_cases import qkv, softmax

from qexport.errors import UsageError
from qexport.nn import QuantumAttentionSimulator, backend_names, simulator
from qexport.noise import channels
from qexport.noise.measured import MeasuredNoise
from qexport.noise.model import NoiseModel
from qexport.ops.quantum_measure_ref import quantum_measure_ref
from qexport.ops.quantum_noise_ref import quantum_noise_ref


class Device:
    """What a hardware backend looks like, with the closed forms inside."""

    def __init__(self):
        self.calls = []

    def measure_rows(self, probabilities, shots, noise, *, basis="z", seed=0):
        self.calls.append((shots, noise))
        for model in noise:
            probabilities, _ = quantum_noise_ref(probabilities, **model.inputs, **model.attributes, basis=basis)
            basis = "z"
        return quantum_measure_ref(probabilities, seed, shots=shots)


def test_backends_that_measure(monkeypatch):
    device = Device()
    monkeypatch.setattr(simulator, "get_backend", lambda name: device)
    Q, K, V = qkv(6, 8, keys=5)
    want = QuantumAttentionSimulator(seed=4).simulate_attention(Q, K, V, 100, 0.2)[1]
    assert torch.equal(QuantumAttentionSimulator(seed=4, backend="lab").simulate_attention(Q, K, V, 100, 0.2)[1], want)
    device.calls.clear()
    zne = QuantumAttentionSimulator(backend="lab", mitigation="zne")
    zne.simulate_attention(Q, K, V, 100, 0.2)
    assert [(shots, len(noise)) for shots, noise in device.calls] == [(43, 1), (42, 2), (15, 3)]
    assert device.calls[0][1] == (NoiseModel("depolarizing", 0.2),)
    leaf = Q.clone().requires_grad_()
    output, _ = QuantumAttentionSimulator(seed=4, backend="lab").simulate_attention(leaf, K, V, 100, 0.2)
    plain = Q.clone().requires_grad_()
    same, _ = QuantumAttentionSimulator(seed=4).simulate_attention(plain, K, V, 100, 0.2)
    assert torch.allclose(*(torch.autograd.grad(y.sum(), x)[0] for y, x in ((output, leaf), (same, plain))))
    with pytest.raises(UsageError, match="backend lab measures: num_samples must be >= 1, got None"):
        QuantumAttentionSimulator(backend="lab").simulate_attention(Q, K, V, None)
    with pytest.raises(UsageError, match="hardware cannot do mitigation pec; take zne with whole scales, or backend auto"):
        QuantumAttentionSimulator(backend="lab", mitigation="pec").simulate_attention(Q, K, V)
    with pytest.raises(UsageError, match="basis overlap must have backend auto, kernel or reference"):
        QuantumAttentionSimulator(backend="lab", basis="overlap")
    monkeypatch.setattr(simulator, "get_backend", lambda name: lambda call: None)
    with pytest.raises(UsageError, match="backend lab has no measure_rows and cannot measure; take backend auto"):
        QuantumAttentionSimulator(backend="lab")


LEVEL = 1e-6  # the draws of other packages change with their versions: one false alarm in a million
INSTALLED = [name for name in backend_names() if name not in ("kernel", "reference")]


@pytest.mark.parametrize("basis", ["z", "x"])
@pytest.mark.parametrize("mitigation", ["none", "readout_inversion"])
@pytest.mark.parametrize("backend", INSTALLED)
def test_installed_backends_measure_the_closed_form(backend, mitigation, basis):
    """Chi-square of what their own simulators find with our noise. Inversion is turned back by the noise itself."""
    noise = (NoiseModel("amplitude_damping", 0.1), NoiseModel("readout", 0.05))
    sim = QuantumAttentionSimulator(noise, basis=basis, mitigation=mitigation, backend=backend, renormalize=False)
    Q, K, V = qkv(3, 6, keys=8)
    shots = 20000
    _, weights = sim.simulate_attention(Q, K, V, shots)
    device = MeasuredNoise(noise, 8, basis)
    if mitigation != "none":
        weights = channels.apply_transitions(weights, device.local("inversion"))
    expected = shots * device.probabilities(softmax(Q, K))
    assert chi2.sf(float(((shots * weights - expected) ** 2 / expected).sum()), 3 * 7) > LEVEL
