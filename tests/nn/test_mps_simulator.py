"""MatrixProductStateSimulator: attention through trains against attention, its report, and what it refuses."""

import math

import pytest
import torch

from qexport import _core
from qexport.errors import QexportError, UsageError
from qexport.mps.layout import KINDS
from qexport.mps.train import decode
from qexport.nn import MatrixProductStateSimulator
from qexport.nn import mps as simulator


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def local_attention(n, heads=(), width=4.0, features=16):
    """Q, K, V whose attention is exp(-(i - j)^2 / 2 width^2) up to the norm of each row: q.k = (i j - j^2 / 2) / width^2."""
    place = torch.arange(n, dtype=torch.float64) - n / 2
    head_size = 2
    Q = torch.stack([place, torch.ones(n, dtype=torch.float64)], -1) * math.sqrt(head_size) / width**2
    K = torch.stack([place, -place.square() / 2], -1)
    V = gaussian(*heads, n, features).double()
    return Q.expand(*heads, n, 2), K.expand(*heads, n, 2), V


def attention(Q, K, V):
    return torch.nn.functional.scaled_dot_product_attention(Q.double(), K.double(), V.double())


@pytest.mark.parametrize("heads", [(), (3,), (2, 4)])
@pytest.mark.parametrize("n", [64, 50, 61])
def test_the_calls_as_they_are_written(heads, n):
    Q, K, V = local_attention(n, heads)
    mps_sim = MatrixProductStateSimulator(max_bond_dim=32)
    mps_tensors = mps_sim.encode_attention_mps(Q, K, V)
    output = mps_sim.mps_attention_forward(mps_tensors, V)
    exact = attention(Q, K, V)
    assert output.shape == V.shape
    report = mps_tensors.report
    error = float((output - exact).norm() / exact.norm())
    assert error <= 1e-4
    assert abs(error - report.output_error) <= 1e-9
    assert report.bytes == mps_tensors.packed().numel() * 8
    assert report.dense_bytes == math.prod(heads) * n * n * 8
    assert report.compression == report.dense_bytes / report.bytes
    assert report.amplitude_bytes_log2 == n + 3


def test_local_attention_is_small():
    """1024 tokens: more than 50 times smaller than the matrix, at an error below 1e-4, chosen without being told how."""
    Q, K, V = local_attention(1024)
    report = MatrixProductStateSimulator(max_bond_dim=32).encode_attention_mps(Q, K, V).report
    assert report.compression >= 50
    assert report.output_error <= 1e-4
    assert report.layout == "interleaved"


def test_random_attention_is_refused_with_the_reason():
    Q, K, V = gaussian(3, 256, 64)
    with pytest.raises(
        QexportError, match=r"at bond dimension 32 the output is off by 0\.\d+, tolerance is 0\.1; .* raise"
    ) as e:
        MatrixProductStateSimulator(max_bond_dim=32).encode_attention_mps(Q, K, V)
    assert "\n" not in str(e.value)
    assert MatrixProductStateSimulator(max_bond_dim=256).encode_attention_mps(Q, K, V).report.output_error < 1e-5


def test_state_error_is_the_error_of_the_matrix():
    Q, K, V = gaussian(3, 2, 64, 16)
    A = torch.softmax(Q.double() @ K.double().mT / 4, -1)
    sim = MatrixProductStateSimulator(max_bond_dim=24, tolerance=0.99)
    tensors = sim.encode_attention_mps(Q.double(), K.double(), V)
    eye = torch.eye(64, dtype=torch.float64).expand(2, 64, 64)
    found = sim.mps_attention_forward(tensors, eye)
    assert abs(float((found - A).norm() / A.norm()) - tensors.report.state_error) <= 1e-12


INPUTS = {"local": lambda: local_attention(64, (2, 3), width=1.5), "Gaussian": lambda: gaussian(3, 2, 60, 16).double()}


@pytest.mark.parametrize("tol", [None, 0.05, 1e-3])
@pytest.mark.parametrize("layout", [*KINDS, "auto"])
@pytest.mark.parametrize("data", INPUTS)
def test_the_kernel_encodes_as_torch_does(monkeypatch, data, layout, tol):
    """The kernel's trains are as good as those of sequential singular value decompositions, and say truly how good. A Gram
    matrix knows an error to 1e-15 of the squared norm: to 1e-6 of itself where it is above 1e-4."""
    Q, K, V = INPUTS[data]()
    sim = MatrixProductStateSimulator(12, tolerance=0.999, tol=tol, layout=layout)
    by_kernel = sim.encode_attention_mps(Q, K, V)
    monkeypatch.setattr(simulator, "kernels", lambda: None)
    by_torch = sim.encode_attention_mps(Q, K, V)
    assert by_kernel.layout == by_torch.layout
    assert (by_kernel.ranks == by_torch.ranks).all()
    assert [core.shape for core in by_kernel.cores] == [core.shape for core in by_torch.cores]
    A = torch.softmax(Q @ K.mT / Q.shape[-1] ** 0.5, -1)
    true = (decode(by_kernel.cores, by_kernel.layout) - A).norm(dim=(-2, -1)) / A.norm(dim=(-2, -1))
    assert ((by_kernel.error - true).abs() <= torch.where(true > 1e-4, 1e-6 * true, 1e-7)).all()
    assert (by_kernel.error <= 1.05 * by_torch.error + 1e-7).all()
    assert (by_kernel.lower_bound - by_torch.lower_bound).abs().max() <= 1e-7


def test_the_kernel_is_taken_where_it_can_be(monkeypatch):
    """Once per layout that is tried, to encode and to sample."""
    taken = []

    class Counting:
        @staticmethod
        def mps_encode(*arguments, **options):
            taken.append(options)
            return _core.mps_encode(*arguments, **options)

    monkeypatch.setattr(simulator, "kernels", lambda: Counting)
    Q, K, V = local_attention(16)
    sim = MatrixProductStateSimulator(8)
    sim.encode_attention_mps(Q, K, V)
    assert [tuple(len(call[f"{axis}_factors"]) for axis in ("row", "col")) for call in taken] == [(8, 8), (4, 4)]
    sim.sample_attention(Q, K, 3)
    assert len(taken) == 4


def test_eigenvalues_that_do_not_converge_are_an_error(monkeypatch):
    def mps_encode(*_, **__):
        raise RuntimeError("[MPSEncode] the eigenvalues of a cut of matrix 0 did not converge")

    monkeypatch.setattr(simulator, "kernels", lambda: type("Core", (), {"mps_encode": staticmethod(mps_encode)}))
    with pytest.raises(QexportError, match="did not converge"):
        MatrixProductStateSimulator(8).encode_attention_mps(*local_attention(16))


@pytest.mark.parametrize("layout", KINDS)
@pytest.mark.parametrize("tol", [None, 0.01])
def test_attention_of_rank_one(layout, tol):
    """Q = 0: every query sees all keys alike, whatever the primes in their number; padded, the matrix has rank 1 still."""
    Q, (K, V) = torch.zeros(31, 4), gaussian(2, 37, 4)
    tensors = MatrixProductStateSimulator(8, tol=tol, layout=layout).encode_attention_mps(Q, K, V)
    assert tensors.report.output_error <= 1e-6
    assert tensors.report.state_error <= 1e-6
    if layout == "serial":
        assert tensors.ranks[len(tensors.layout.row_factors) // 2 + 1] <= 2


@pytest.mark.parametrize(("bond_dim", "n"), [(2, 256), (32, 256)])
def test_both_ways_of_the_product(bond_dim, n):
    """Through the cores where the bonds are few, through the matrix where they are many, by the kernel and by torch: the
    same output, and its gradient."""
    Q, K, V = gaussian(3, n, 64)
    sim = MatrixProductStateSimulator(max_bond_dim=bond_dim, tolerance=0.999, layout="interleaved")
    tensors = sim.encode_attention_mps(Q.double(), K.double(), V.double())
    assert tensors.report.cost.method == ("dense" if bond_dim == 32 else "factored")
    by_kernel = sim.mps_attention_forward(tensors, V.double())
    V = V.double().requires_grad_()
    output = sim.mps_attention_forward(tensors, V)
    assert not by_kernel.requires_grad
    assert (output - by_kernel).abs().max() <= 1e-12
    eye = torch.eye(n, dtype=torch.float64)
    matrix = sim.mps_attention_forward(tensors, eye)
    assert (output - matrix @ V).abs().max() <= 1e-12
    (gradient,) = torch.autograd.grad(output.square().sum(), V)
    assert (gradient - 2 * matrix.mT @ matrix @ V).abs().max() <= 1e-10


def test_tol_takes_the_smallest_ranks():
    Q, K, V = local_attention(256)
    loose, tight = (MatrixProductStateSimulator(64, tol=tol).encode_attention_mps(Q, K, V).report for tol in (1e-2, 1e-5))
    assert loose.state_error <= 1e-2
    assert tight.state_error <= 1e-5
    assert loose.bytes < tight.bytes


def test_samples_look_where_attention_looks():
    """The share of each key over all queries; a bound of 5 standard deviations on each of 32 keys."""
    Q, K = gaussian(2, 32, 8)
    shots = 20_000
    sim = MatrixProductStateSimulator(max_bond_dim=32)
    pairs = sim.sample_attention(Q, K, shots, seed=5)
    assert (pairs == sim.sample_attention(Q, K, shots, seed=5)).all()
    p = torch.softmax(Q.double() @ K.double().mT / 8**0.5, -1).mean(0)
    share = torch.bincount(pairs[:, 1], minlength=32) / shots
    assert ((share - p).abs() <= 5 * (p * (1 - p) / shots).sqrt()).all()
    uniform = torch.bincount(pairs[:, 0], minlength=32) / shots
    assert ((uniform - 1 / 32).abs() <= 5 * (1 / 32 * 31 / 32 / shots) ** 0.5).all()


def test_entropy_per_bond():
    Q, K, V = local_attention(64, (2,))
    sim = MatrixProductStateSimulator(max_bond_dim=32)
    tensors = sim.encode_attention_mps(Q, K, V)
    entropy = sim.entanglement_entropy(tensors)
    assert entropy.shape == (2, len(tensors.cores) - 1)
    assert (entropy <= torch.log2(torch.tensor(tensors.bonds[1:-1], dtype=torch.float64)) + 1e-9).all()
    assert (entropy > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatrixProductStateSimulator(max_bond_dim=0), "max_bond_dim must be >= 1, got 0"),
        (lambda: MatrixProductStateSimulator(max_bond_dim=2.5), "max_bond_dim must be a whole number, got 2.5"),
        (lambda: MatrixProductStateSimulator(tolerance=0), r"tolerance must be in \(0, 1\), got 0"),
        (lambda: MatrixProductStateSimulator(tolerance=1), r"tolerance must be in \(0, 1\), got 1"),
        (lambda: MatrixProductStateSimulator(tolerance=None), "tolerance must be a number, got None"),
        (lambda: MatrixProductStateSimulator(tol="x"), "tol must be a number, got 'x'"),
        (lambda: MatrixProductStateSimulator().mps_attention_forward(5, None), "mps_tensors must be what encode_.* got int"),
        (lambda: MatrixProductStateSimulator.entanglement_entropy([]), "mps_tensors must be what encode_.* got list"),
        (lambda: MatrixProductStateSimulator(tol=2), r"tol must be in \(0, 1\), got 2"),
        (lambda: MatrixProductStateSimulator(layout="best"), "layout must be one of serial, interleaved, auto"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_wrong_shapes():
    sim, (Q, K, V) = MatrixProductStateSimulator(), local_attention(16)
    with pytest.raises(UsageError, match=r"Q and K must be .*, got \(16, 2\), \(16, 1\)"):
        sim.encode_attention_mps(Q, K[:, :1], V)
    with pytest.raises(UsageError, match=r"V must hold floating point numbers, got torch.int64"):
        sim.encode_attention_mps(Q, K, V.long())
    with pytest.raises(UsageError, match=r"V must be \(16, 'v_head_size'\), got \(9, 16\)"):
        sim.encode_attention_mps(Q, K, V[:9])
    with pytest.raises(UsageError, match=r"Q must be finite, got nan at \[0, 0\]"):
        sim.encode_attention_mps(Q * float("nan"), K, V)
    with pytest.raises(UsageError, match=r"K must be finite, got -?inf at \[0, 0\]"):
        sim.sample_attention(Q, K / 0, 3)
    with pytest.raises(UsageError, match=r"V must be finite, got -?inf at \[0, 0\]"):
        sim.encode_attention_mps(Q, K, V * float("inf"))
    with pytest.raises(UsageError, match=r"K must be a torch.Tensor, got numpy.ndarray; give torch.from_numpy\(K\)"):
        sim.sample_attention(Q, K.numpy(), 3)
    with pytest.raises(UsageError, match=r"V must be a torch.Tensor, got list; give torch.as_tensor\(V\)"):
        sim.encode_attention_mps(Q, K, V.tolist())
    with pytest.raises(UsageError, match=r"V must be a torch\.Tensor, got numpy\.ndarray"):
        sim.mps_attention_forward(sim.encode_attention_mps(Q, K, V), V.numpy())
    with pytest.raises(UsageError, match=r"seed must be .* 64 bits, .*, got -9223372036854775809"):
        sim.sample_attention(Q, K, 3, seed=-(2**63) - 1)
    with pytest.raises(UsageError, match=r"Q must hold floating point numbers, got \(16, 2\) of torch.int64"):
        sim.encode_attention_mps(Q.long(), K, V)
    with pytest.raises(UsageError, match=r"Q must hold floating point numbers, got \(0, 16, 2\)"):
        sim.encode_attention_mps(Q.expand(0, 16, 2), K.expand(0, 16, 2), V.expand(0, 16, 16))
    tensors = sim.encode_attention_mps(Q, K, V)
    with pytest.raises(UsageError, match=r"V must be \(16, 'v_head_size'\), got \(2, 16, 16\)"):
        sim.mps_attention_forward(tensors, V.expand(2, 16, 16))
