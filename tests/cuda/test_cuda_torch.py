"""The CUDA kernels behind the torch functions: tensors where they lie, torch's stream, seeds that a graph reads anew."""

import numpy as np
import pytest
import torch
from calls import seed_on

from qexport import _core
from qexport.errors import UsageError
from qexport.nn import MatrixProductStateSimulator, quantum_attention, quantum_measure, quantum_noise
from qexport.nn.cuda import TorchMemory
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.strategies import read_by

SAMPLED = {"strategy": "stratified", "num_samples": [6]}


class OnTheCpu(TorchMemory):
    """Tensors of the CPU as the memory of a device, for the emulation."""

    stream = 0

    def __init__(self, kernels):
        self.kernels, self.device = kernels, torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_described(emulated, dtype):
    """What torch says of a tensor is what numpy says of the same memory, transposed ones and other types included."""
    memory = OnTheCpu(emulated.kernels)
    q, k, v = (torch.randn(1, 9, 2, 8).to(dtype).swapaxes(1, 2) for _ in range(3))
    mask = torch.rand(9, 9) < 0.7
    attributes = {name: value for name, value in QUANTUM_ATTENTION.resolve(SAMPLED).items() if value is not None}
    found = _core.quantum_attention(q, k, v, mask.T, seed=memory.seed(5), **attributes, device=memory)[0]
    arrays = [emulated.put(x.float().numpy()) for x in (q, k, v)]
    want = _core.quantum_attention(*arrays, mask.numpy().T.copy(), seed=seed_on(emulated, 5), **attributes, device=emulated)[
        0
    ]
    assert found.dtype == dtype
    assert (found.float() - torch.from_numpy(want)).abs().max() <= {torch.float32: 1e-6}.get(dtype, 0.02)


def qkv(dtype=torch.float32, rows=40, **more):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, rows, 16, generator=generator).to("cuda", dtype).requires_grad_(**more) for _ in range(3)]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
class TestOnTheGpu:
    @pytest.mark.parametrize("strategy", ["exact", "naive", "stratified", "adaptive", "hybrid", "tree"])
    def test_auto_is_the_kernel_and_agrees_with_the_reference(self, strategy):
        a = read_by(strategy, {"strategy": strategy, "num_samples": [6], "layer": 2})
        auto, kernel, reference = (
            quantum_attention(*qkv(), seed=7, backend=b, **a) for b in ("auto", "kernel", "reference")
        )
        assert torch.equal(auto, kernel)
        assert ((auto - reference).abs().amax(-1) > 1e-4).float().mean() <= 0.02

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_types_and_weights(self, dtype):
        Y, weights = quantum_attention(*qkv(dtype), need_weights=True, strategy="exact")
        want, expected = quantum_attention(*qkv(dtype), need_weights=True, strategy="exact", backend="reference")
        assert Y.dtype == weights.dtype == dtype
        assert (Y - want).abs().max() <= 0.02
        assert (weights - expected).abs().max() <= 0.01

    def test_float64_is_explicit(self):
        with pytest.raises(UsageError, match=r"got float64 on cuda:0; take backend reference"):
            quantum_attention(*qkv(torch.float64), backend="kernel")
        assert quantum_attention(*qkv(torch.float64)).dtype == torch.float64

    def test_gradients_are_those_of_the_reference(self):
        found = {}
        for backend in ("kernel", "reference"):
            inputs = qkv(requires_grad=True)
            quantum_attention(*inputs, seed=3, backend=backend, **SAMPLED).square().sum().backward()
            found[backend] = [x.grad for x in inputs]
        for a, b in zip(*found.values(), strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm()

    @pytest.mark.parametrize("strategy", ["exact", "naive", "stratified", "adaptive", "hybrid", "tree"])
    def test_nothing_waits_and_a_graph_draws_anew(self, strategy):
        """A captured call reads its seed and its inputs each time that it runs."""
        inputs, seed = qkv(rows=300), torch.zeros((), dtype=torch.int64, device="cuda")
        a = {"strategy": strategy, "num_samples": [20], "control_variate": 0, "residual": "unbiased"}
        a = read_by(strategy, a)

        def y():
            return quantum_attention(*inputs, seed=seed, **a)

        with torch.no_grad():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                y()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured = y()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for number in (5, 1 << 40):
                seed.fill_(number)
                inputs[0].mul_(0.9)
                graph.replay()
                assert torch.equal(captured, y())

    def test_other_streams(self):
        inputs = qkv(rows=200)
        want = quantum_attention(*inputs, seed=1, **SAMPLED)
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(quantum_attention(*inputs, seed=1, **SAMPLED))
        torch.cuda.synchronize()
        assert all(torch.equal(y, want) for y in found)

    def test_compiled(self):
        compiled = torch.compile(lambda q, k, v: quantum_attention(q, k, v, seed=1, **SAMPLED) * 2, backend="aot_eager")
        assert torch.equal(compiled(*qkv()), 2 * quantum_attention(*qkv(), seed=1, **SAMPLED))

    def test_noise_and_measurement(self):
        p = torch.softmax(torch.randn(3, 5, 33), -1).cuda()
        levels = torch.full((6,), 0.2)
        for level, channel in ((torch.tensor(0.1), "depolarizing"), (levels, "amplitude_damping")):
            found = quantum_noise(p, level.cuda(), channel=channel)
            want = quantum_noise(p.cpu(), level, channel=channel)
            for a, b in zip(found, want, strict=True):
                assert a.is_cuda
                assert (a.cpu() - b).abs().max() <= 1e-6
        for seed in (4, torch.tensor(4), torch.tensor(4, device="cuda")):
            assert torch.equal(quantum_measure(p, seed, shots=50).cpu(), quantum_measure(p.cpu(), 4, shots=50))
        level = torch.tensor(0.1, device="cuda", requires_grad=True)
        quantum_noise(p, level)[0].square().sum().backward()
        assert level.grad.abs() > 0

    def test_trains(self):
        q, k, v = (x[0].detach() for x in qkv(rows=64))
        simulator = MatrixProductStateSimulator(max_bond_dim=32, tolerance=0.9)
        train = simulator.encode_attention_mps(q, k, v)
        want = np.asarray(simulator.mps_attention_forward(train, v.requires_grad_()).detach().cpu())  # by torch
        found = simulator.mps_attention_forward(train, v.detach())
        assert found.is_cuda
        np.testing.assert_allclose(found.cpu(), want, atol=1e-5)
