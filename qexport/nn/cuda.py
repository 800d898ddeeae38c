"""The CUDA kernels on the memory of torch tensors: nothing is copied; the work is queued on the stream that torch uses."""

import functools

import torch

from qexport import installed
from qexport.errors import QexportError
from qexport.ops.kernels import kernels

OLDEST = (7, 5)  # compute capability


class TorchMemory:
    """The `device` of the functions of qexport._core: what they ask of tensors on a CUDA device.

    Args:
        device: of the tensors.

    Raises:
        QexportError: there are no kernels for it; the message says why.
    """

    def __init__(self, device: torch.device):
        self.kernels, self.device = _plugin(), device
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            have, need = (".".join(map(str, version)) for version in (capability, OLDEST))
            raise QexportError(
                f"the CUDA kernels need compute capability {need} or newer, {device} has {have}; take backend reference"
            )

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

    def seed(self, seed) -> torch.Tensor:
        """A seed, a number or a tensor, as the kernels read it: on the device, when they run."""
        if isinstance(seed, torch.Tensor) and seed.is_cuda:
            return seed.reshape(()).to(self.device, torch.int64)
        return torch.full((), int(seed), dtype=torch.int64, device=self.device)

    def call(self, op: str, *tensors, **attributes):
        """The outputs of an op, by the name of its function in qexport._core.

        Raises:
            QexportError: the device refuses the work.
        """
        with torch.cuda.device(self.device):
            try:
                return getattr(kernels(), op)(*tensors, **attributes, device=self)
            except RuntimeError as error:
                raise QexportError(str(error)) from None


@functools.cache
def cuda_memory(device: torch.device) -> TorchMemory:
    """The kernels for tensors on a device.

    Raises:
        QexportError: as TorchMemory.
    """
    return TorchMemory(device)


def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for tensors on this device, CPU or CUDA."""
    if device.type == "cpu":
        return kernels() is not None
    return device.type == "cuda" and _has_cuda_kernels(device)


@functools.cache
def _has_cuda_kernels(device: torch.device) -> bool:
    try:
        cuda_memory(device)
    except QexportError:
        return False
    return True


@functools.cache
def _plugin():
    core, path = kernels(), installed.find_cuda_plugin()
    if core is None or path is None:
        raise QexportError(
            "this installation of qexport has no CUDA kernels: install it where there is nvcc (docs/cuda.md), or take "
            "backend reference"
        )
    try:
        return core.load_cuda(str(path))
    except RuntimeError as error:
        why = f"the CUDA kernels cannot be loaded: {error}"
        raise QexportError(f"{why}; reinstall qexport, or take backend reference") from None
