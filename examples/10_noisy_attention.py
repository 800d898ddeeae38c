"""Attention on noisy qubits in torch: what noise and shots do to it, what mitigation wins back, and a gradient."""

import torch

from qexport.nn import QuantumAttentionSimulator

torch.manual_seed(0)
Q, K, V = (torch.randn(64, 64) for _ in range(3))
exact = torch.nn.functional.scaled_dot_product_attention(Q, K, V)
for noise_model in ("depolarizing", "amplitude_damping", "phase_damping", "thermal_relaxation"):
    quantum_sim = QuantumAttentionSimulator(noise_model=noise_model)
    output, weights = quantum_sim.simulate_attention(Q, K, V, num_samples=32, noise_level=0.01)
    no_shot_noise, _ = quantum_sim.simulate_attention(Q, K, V, num_samples=None, noise_level=0.01)
    errors = [float((y - exact).norm() / exact.norm()) for y in (output, no_shot_noise)]
    print(f"{noise_model}: error {errors[0]:.3f} with 32 shots, {errors[1]:.3f} of the noise alone")
for mitigation in ("none", "readout_inversion", "zne", "pec", "repetition:3"):  # the same 4096 shots for each
    quantum_sim = QuantumAttentionSimulator("depolarizing", mitigation=mitigation)
    output, weights = quantum_sim.simulate_attention(Q, K, V, num_samples=4096, noise_level=0.1)
    print(f"{mitigation}: error {float((output - exact).norm() / exact.norm()):.3f}")
level = torch.tensor(0.05, requires_grad=True)  # the level is a parameter as any other
output, _ = QuantumAttentionSimulator("amplitude_damping").simulate_attention(Q, K, V, num_samples=32, noise_level=level)
((output - exact) ** 2).mean().backward()
print(f"slope of the error in the level: {float(level.grad):.2f}")
