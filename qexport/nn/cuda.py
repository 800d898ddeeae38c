"""The CUDA kernels on the memory of torch tensors, on the stream that torch uses."""

import functools

import torch

from qexport.errors import QexportError
from qexport.ops.kernels import kernels
from qexport.runtime import find_cuda_plugin


class TorchMemory:
    """The `device` of the functions of qexport._core: what they ask of tensors on a CUDA device.

    Args:
        device: of the tensors.

    Raises:
        QexportError: there are no CUDA kernels; the message says why.
    """

    def __init__(self, device: torch.device):
        self.kernels, self.device = cuda_kernels(), device

    @property
    def stream(self) -> int:
        """The address of torch's current stream."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def describe(self, tensor) -> tuple:
        """(address, name of the type, shape, strides in elements)."""
        return tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tensor.shape, tensor.stride()

    def contiguous(self, tensor) -> torch.Tensor:
        """The tensor, or a copy without gaps."""
        return tensor.contiguous()

    def empty(self, shape, dtype) -> torch.Tensor:
        """A new tensor of a type of torch, or of the name of one."""
        return torch.empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype, device=self.device)


@functools.cache
def cuda_kernels():
    """The kernels of the installed plugin.

    Raises:
        QexportError: it was not built, or cannot be loaded.
    """
    core, path = kernels(), find_cuda_plugin()
    if core is None or path is None:
        raise QexportError(
            'this installation of qexport has no CUDA kernels; install it where there is nvcc (README, "CUDA"), or take '
            "backend reference"
        )
    try:
        return core.load_cuda(str(path))
    except RuntimeError as error:
        raise QexportError(
            f"the CUDA kernels cannot be loaded: {error}; reinstall qexport, or take backend reference"
        ) from None
