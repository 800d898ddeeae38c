"""Who computes sampled attention in torch, chosen by name.

A backend is a callable `(call) -> (Y, probabilities or None)` on an `AttentionCall`. `reference` and `kernel` are here;
other packages bring theirs through the entry-point group `qexport.backends`, whose names are then known as these are:

    [project.entry-points."qexport.backends"]
    my_device = "my_package:attention"

Gradients are the same for all of them: those of the reference, at the same seed (`qexport.nn.functional`).
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import torch

from qexport.errors import QexportError, UsageError
from qexport.mps.layout import Layout
from qexport.nn.cuda import cuda_memory, has_kernels
from qexport.ops.kernels import kernels

GROUP = "qexport.backends"


@dataclass(frozen=True)
class AttentionCall:
    """One call of QuantumAttention, as a backend gets it.

    Attributes:
        Q, K, V: (batch, heads, length, size), or (batch, length, heads * size) with the head counts among the attributes.
        attn_mask: bool (true = attend) or of Q's type, broadcastable to (batch, heads, q_len, kv_len), or None.
        attributes: those of the op table, all of them, None where an optional one is absent.
        seed: of the draws; for backend `kernel` on a CUDA device also a tensor there, which is read when the kernels run.
        need_weights: whether the probabilities (batch, heads, q_len, kv_len) are asked for.
        dropout_p: share of the probabilities that is set to 0, the others scaled up to keep their sum on average.
    """

    Q: torch.Tensor
    K: torch.Tensor
    V: torch.Tensor
    attn_mask: torch.Tensor | None
    attributes: dict
    seed: int | torch.Tensor
    need_weights: bool
    dropout_p: float


Backend = Callable[[AttentionCall], tuple[torch.Tensor, torch.Tensor | None]]


def backend_names() -> list[str]:
    """The names that `backend` takes beside `auto`, those of installed packages included, sorted."""
    return sorted({*_OWN, *(point.name for point in entry_points(group=GROUP))})


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend of a name.

    Raises:
        UsageError: no backend has that name; the message lists the known ones.
        QexportError: the package that brings it cannot be imported.
    """
    if name in _OWN:
        return _OWN[name]
    for point in entry_points(group=GROUP, name=name):
        try:
            return point.load()
        except Exception as error:
            raise QexportError(f"backend {name!r} ({point.value}) cannot be loaded: {error}") from error
    raise UsageError(f"backend must be one of {', '.join(['auto', *backend_names()])}, got {name!r}")


def chosen_backend(backend: str, tensor: torch.Tensor, dropout_p: float) -> str:
    """What `auto` is for a call: the kernel for float32, float16 and bfloat16 on the CPU, and on a CUDA device where the
    kernels for it were built; the reference otherwise."""
    if backend != "auto":
        return backend
    fits = tensor.dtype in _KERNEL_TYPES and dropout_p == 0 and has_kernels(tensor.device)
    return "kernel" if fits else "reference"


def reference(call: AttentionCall):
    """Pure torch, any device, differentiable; holds several (batch, heads, q_len, kv_len) arrays."""
    from qexport.ops.quantum_attention_ref import quantum_attention_ref

    dtype = torch.float64 if call.Q.dtype == torch.float64 else torch.float32
    attributes = call.attributes | {"qk_matmul_output_mode": 3}
    with torch.autocast(call.Q.device.type, enabled=False):  # it would compute the probabilities in half precision
        outputs = quantum_attention_ref(
            call.Q, call.K, call.V, call.attn_mask, seed=call.seed, dtype=dtype, dropout_p=call.dropout_p, **attributes
        )
    return outputs[0], outputs[3] if call.need_weights else None


def kernel(call: AttentionCall):
    """The compiled kernels on the memory of the tensors: on the CPU in C++, with as many threads as torch has, on a CUDA
    device on torch's stream. No gradient flows through it."""
    device = call.Q.device
    if kernels() is None:
        raise QexportError("backend kernel: qexport was installed without its kernels; take backend reference, or reinstall")
    if device.type not in ("cpu", "cuda") or call.Q.dtype not in _KERNEL_TYPES:
        types = ", ".join(str(t).removeprefix("torch.") for t in _KERNEL_TYPES)
        got = f"{str(call.Q.dtype).removeprefix('torch.')} on {device}"
        raise UsageError(f"backend kernel takes {types} on the CPU or a CUDA device, got {got}; take backend reference")
    if call.dropout_p:
        raise UsageError(
            f"backend kernel has no dropout, got dropout_p {call.dropout_p}; take backend reference or set it to 0"
        )
    attributes = {name: value for name, value in call.attributes.items() if value is not None}
    attributes.pop("softmax_precision", None)
    attributes |= {"qk_matmul_output_mode": 3, "qk_matmul_output": call.need_weights}
    tensors = call.Q, call.K, call.V, call.attn_mask
    if device.type == "cuda":
        memory = cuda_memory(device)
        seed = None if attributes["strategy"] == "exact" else memory.seed(call.seed)
        outputs = memory.call("quantum_attention", *tensors, seed=seed, **attributes)
        return outputs[0], outputs[3]
    outputs = kernels().quantum_attention(
        *(None if x is None else to_numpy(x) for x in tensors),
        seed=call.seed,
        threads=torch.get_num_threads(),
        pool=torch_pool(),
        **attributes,
    )
    return to_torch(outputs[0], call.Q.dtype), to_torch(outputs[3], call.Q.dtype) if call.need_weights else None


def kernel_train_product(cores: torch.Tensor, layout: Layout, bonds: tuple[int, ...], V: torch.Tensor):
    """MPSAttention by its kernel, for cores (..., numbers) of the type of V (..., cols, features) and as many leading axes.
    None where it cannot be asked: no float type, not built for their device, or a gradient is wanted."""
    fits = cores.device == V.device and V.dtype in (*_KERNEL_TYPES, torch.float64) and has_kernels(V.device)
    wants_gradient = torch.is_grad_enabled() and (cores.requires_grad or V.requires_grad)
    if not fits or wants_gradient or torch.compiler.is_compiling():
        return None
    attributes = {
        "rows": layout.rows,
        "cols": layout.cols,
        "row_factors": layout.row_factors,
        "col_factors": layout.col_factors,
        "bonds": bonds,
        "method": "auto",
    }
    tensors = cores.reshape(-1, cores.shape[-1]), V.reshape(-1, *V.shape[-2:])
    if V.is_cuda:
        Y = cuda_memory(V.device).call("mps_attention", *tensors, **attributes)
    else:
        threads = {"threads": torch.get_num_threads(), "pool": torch_pool()}
        Y = to_torch(kernels().mps_attention(*map(to_numpy, tensors), **attributes, **threads), V.dtype)
    return Y.reshape(*V.shape[:-2], layout.rows, V.shape[-1])


_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_OWN = {"kernel": kernel, "reference": reference}


@functools.cache
def torch_pool() -> int:
    """The address of torch_parallel_for of torch's stable C interface, 0 where it has none: beside idle threads of torch,
    which spin for a while, threads of our own would wait for a processor."""
    folder = Path(torch.__file__).parent / "lib"
    for file in folder.glob("*torch_cpu.*"):
        try:
            return ctypes.cast(ctypes.CDLL(str(file)).torch_parallel_for, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return 0


def to_numpy(tensor):
    """The same memory; numpy knows bfloat16 through ml_dtypes alone."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def to_torch(array, dtype):
    """The same memory as a tensor of `dtype`, which the array has."""
    import numpy as np

    return torch.from_numpy(array.view(np.int16)).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(array)
