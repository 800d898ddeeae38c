"""Attention matrices as matrix product states: what that saves, what it costs, and where it is refused."""

from dataclasses import dataclass, replace

import torch

from qexport.arguments import check_finite, check_tensors, real, whole
from qexport.errors import QexportError, UsageError
from qexport.mps.canonical import entanglement_entropy, sample
from qexport.mps.cost import Cost, attention_cost
from qexport.mps.layout import KINDS, Layout
from qexport.mps.train import MatrixProduct, apply, merge, unpack
from qexport.mps.tt_svd import encode, tt_svd
from qexport.nn.backends import kernel_train_product, torch_pool
from qexport.ops.kernels import kernels


@dataclass(frozen=True)
class MPSReport:
    """What the encoding of a (batch of) attention matrix saves and costs.

    Attributes:
        state_error: |A - A'| / |A| over the batch, Frobenius; exact, from the singular values that were discarded.
        output_error: |A V - A' V| / |A V| over the batch.
        bytes: of the cores, all matrices together.
        dense_bytes: of the attention matrices in the same type: the memory that is saved is the difference.
        compression: dense_bytes / bytes.
        amplitude_bytes_log2: log2 of the bytes of the 2^n amplitudes of n = q_len qubits, the denominator of "exponential"
            compression claims. No attention program holds them; nothing is saved against it.
        layout, bonds: of the cores.
        cost: estimated time of A' V of one matrix through the cores and through the matrix.
    """

    state_error: float
    output_error: float
    bytes: int
    dense_bytes: int
    compression: float
    amplitude_bytes_log2: float
    layout: str
    bonds: tuple[int, ...]
    cost: Cost


@dataclass(frozen=True)
class AttentionMPS(MatrixProduct):
    """Attention matrices (..., q_len, kv_len) as trains, with what they save and cost.

    Attributes:
        report: compression and errors.
    """

    report: MPSReport


class MatrixProductStateSimulator:
    """Encodes attention matrices as matrix product states and multiplies with them.

    Args:
        max_bond_dim: largest bond dimension.
        tolerance: largest relative error of the output, in (0, 1). What is worse is refused, with the reason.
        tol: None: bonds as large as max_bond_dim allows. Else in (0, 1): the smallest for that relative error of the matrix.
        layout: `auto` (chosen by error), `serial` or `interleaved`.

    Raises:
        UsageError: an argument outside its limits.
    """

    def __init__(self, max_bond_dim: int = 32, tolerance: float = 0.1, tol: float | None = None, layout: str = "auto"):
        max_bond_dim = whole("max_bond_dim", max_bond_dim)
        for name, value in (("tolerance", tolerance), *([] if tol is None else [("tol", tol)])):
            if not 0 < real(name, value) < 1:
                raise UsageError(f"{name} must be in (0, 1), got {value:g}")
        if layout not in (*KINDS, "auto"):
            raise UsageError(f"layout must be one of {', '.join(KINDS)}, auto, got {layout!r}")
        self.max_bond_dim, self.tolerance, self.tol, self.layout = max_bond_dim, tolerance, tol, layout

    @torch.no_grad()
    def encode_attention_mps(self, Q, K, V) -> AttentionMPS:
        """softmax(Q K^T / sqrt(head_size)) of each head as a train, by the kernel of MPSEncode on the CPU and by torch
        elsewhere, in float64. Without gradients.

        Args:
            Q: (..., q_len, head_size).
            K: (..., kv_len, head_size).
            V: (..., kv_len, v_head_size); what the error of the output is measured with.

        Returns:
            The cores in the type of Q, and `report`.

        Raises:
            UsageError: shapes that do not fit each other, other types than floating point, a number that is not finite.
            QexportError: the error of the output is above `tolerance`.
        """
        check_tensors({"V": V})
        A = _attention(Q, K)
        if V.shape[:-1] != K.shape[:-1]:
            raise UsageError(f"V must be {(*K.shape[:-1], 'v_head_size')}, got {tuple(V.shape)}")
        if not V.is_floating_point():
            raise UsageError(f"V must hold floating point numbers, got {V.dtype}")
        check_finite("V", V)
        train = encode(A, self.max_bond_dim, self.tol, self.layout, decompose=_tt_svd)
        train = replace(train, cores=tuple(core.to(Q.dtype) for core in train.cores))
        report = _report(train, A, V.double())
        if not report.output_error <= self.tolerance:
            raise QexportError(
                f"encoding refused: at bond dimension {max(report.bonds)} the output is off by {report.output_error:.2g}, "
                f"tolerance is {self.tolerance:g}; the matrix is off by {report.state_error:.2g} in the {report.layout} "
                f"layout, and by {float(train.lower_bound.max()):.2g} at least in any train of these ranks: raise "
                "max_bond_dim or tolerance, or use attention itself"
            )
        return AttentionMPS(train.cores, train.layout, train.ranks, train.error, train.lower_bound, report)

    def mps_attention_forward(self, mps_tensors: AttentionMPS, V) -> torch.Tensor:
        """The output of attention (..., q_len, v_head_size), through the cores or through the matrix, whichever is estimated
        to be faster (`report.cost`): by the kernel of MPSAttention where the device has one, and by torch elsewhere and
        where a gradient with respect to V is wanted.

        Args:
            mps_tensors: what `encode_attention_mps` returned.
            V: (..., kv_len, v_head_size) of the same batch; its type is that of the result.

        Raises:
            UsageError: V has another batch or number of keys.
        """
        _check_train(mps_tensors)
        check_tensors({"V": V})
        layout, batch = mps_tensors.layout, mps_tensors.error.shape
        if V.ndim < 2 or V.shape[:-2] != batch or V.shape[-2] != layout.cols:
            raise UsageError(f"V must be {(*batch, layout.cols, 'v_head_size')}, got {tuple(V.shape)}")
        bonds = mps_tensors.bonds
        output = kernel_train_product(mps_tensors.packed().to(V.dtype), layout, bonds, V)
        if output is not None:
            return output
        cores = tuple(core.to(V.dtype) for core in mps_tensors.cores)
        return apply(*merge(cores, layout, attention_cost(layout, bonds, V.shape[-1]).groups), V)

    @torch.no_grad()
    def sample_attention(self, Q, K, shots: int, seed: int = 0) -> torch.Tensor:
        """Measurements of the state sum_ij sqrt(A_ij / q_len) |i>|j> of one head, from its matrix product state.

        Args:
            Q: (q_len, head_size).
            K: (kv_len, head_size).
            shots: measurements.
            seed: int64; the same seed, the same draws.

        Returns:
            int64 (shots, 2): query and key; a query is uniform, a key follows its row of attention, up to the
                error of the state.

        Raises:
            UsageError: shapes, more than one head, shots below 1.
        """
        train = encode(_attention(Q, K).sqrt(), self.max_bond_dim, self.tol, self.layout, decompose=_tt_svd)
        return sample(train, shots, seed)

    @staticmethod
    def entanglement_entropy(mps_tensors: AttentionMPS) -> torch.Tensor:
        """Entropy in bits across each bond: float64 (..., sites - 1), at most log2 of the bond dimension.

        Args:
            mps_tensors: what `encode_attention_mps` returned.
        """
        _check_train(mps_tensors)
        return entanglement_entropy(mps_tensors)


def _check_train(mps_tensors) -> None:
    if not isinstance(mps_tensors, MatrixProduct):
        wanted = "mps_tensors must be what encode_attention_mps returned"
        raise UsageError(f"{wanted}, got {type(mps_tensors).__name__}")


def _attention(Q, K) -> torch.Tensor:
    check_tensors({"Q": Q, "K": K})
    if Q.ndim < 2 or K.shape[:-2] != Q.shape[:-2] or K.ndim != Q.ndim or K.shape[-1] != Q.shape[-1]:
        shapes = f"{tuple(Q.shape)}, {tuple(K.shape)}"
        raise UsageError(f"Q and K must be (..., q_len, head_size) and (..., kv_len, head_size), got {shapes}")
    for name, tensor in (("Q", Q), ("K", K)):
        if not tensor.is_floating_point() or not tensor.numel():
            raise UsageError(f"{name} must hold floating point numbers, got {tuple(tensor.shape)} of {tensor.dtype}")
        check_finite(name, tensor)
    return torch.softmax(Q.double() @ K.double().mT / Q.shape[-1] ** 0.5, -1)


def _tt_svd(matrix, layout: Layout, bonds: tuple[int, ...], tol: float) -> MatrixProduct:
    """`tt_svd` of a float64 matrix (..., rows, cols) with bonds of `Layout.bonds`, by the kernel of MPSEncode on the CPU
    where it was built."""
    core = kernels()
    if matrix.device.type != "cpu" or core is None:
        return tt_svd(matrix, layout, bonds, tol)
    batch = matrix.shape[:-2]
    try:
        found = core.mps_encode(
            matrix.reshape(-1, *matrix.shape[-2:]).numpy(),
            row_factors=layout.row_factors,
            col_factors=layout.col_factors,
            bond_dim=max(bonds),
            tol=tol,
            threads=torch.get_num_threads(),
            pool=torch_pool(),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    except RuntimeError as error:
        raise QexportError(str(error)) from None
    cores, ranks, error, lower_bound = (torch.from_numpy(x).reshape((*batch, *x.shape[1:])) for x in found)
    # Like tt_svd, no larger than the largest rank in the batch.
    most = ranks.reshape(-1, len(bonds)).amax(0).tolist()
    parts = zip(unpack(cores, layout, bonds), most[:-1], most[1:], strict=True)
    return MatrixProduct(tuple(c[..., :a, :, :, :b] for c, a, b in parts), layout, ranks, error, lower_bound)


def _report(train: MatrixProduct, A: torch.Tensor, V: torch.Tensor) -> MPSReport:
    matrices = max(1, train.error.numel())
    size, item = train.bytes_per_matrix * matrices, train.cores[0].element_size()
    norms2 = A.square().sum((-2, -1))
    exact = A @ V
    found = apply(tuple(core.double() for core in train.cores), train.layout, V)
    scale = float(torch.linalg.vector_norm(exact))
    return MPSReport(
        state_error=float(((train.error.square() * norms2).sum() / norms2.sum()).sqrt()),
        output_error=float(torch.linalg.vector_norm(found - exact)) / (scale or 1.0),
        bytes=size,
        dense_bytes=A.numel() * item,
        compression=A.numel() * item / size,
        amplitude_bytes_log2=A.shape[-2] + float(torch.log2(torch.tensor(float(item)))),
        layout=train.layout.kind,
        bonds=train.bonds,
        cost=attention_cost(train.layout, train.bonds, V.shape[-1]),
    )
