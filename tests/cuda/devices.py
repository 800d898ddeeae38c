"""Where the CUDA kernels run in tests, as the `device` of the functions of qexport._core: `emulated`, on numpy arrays as the
memory of a device, and `gpu`, on torch tensors."""

import ctypes
import mmap

import ml_dtypes
import numpy as np
import pytest

from qexport import _core


def guarded(shape, dtype):
    """An array behind which nothing may be read or written: its end, rounded up to 16 bytes, is that of the memory. It holds
    NaN, so that what is not written shows."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    whole = -(-size // 16) * 16
    end = -(-whole // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    array = np.frombuffer(memory, np.uint8, size, end - whole)
    array.fill(0xFF)
    last = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + end
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(last), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError("mprotect failed")
    return array.view(dtype).reshape(shape)


class Emulated:
    """The kernels of the emulation library, on arrays behind which the process ends."""

    name, stream = "emulated", 0

    def __init__(self, library):
        self.kernels = _core.load_cuda(str(library))

    def describe(self, array):
        strides = [stride // array.itemsize for stride in array.strides]
        return array.__array_interface__["data"][0], str(array.dtype), array.shape, strides

    def contiguous(self, array):
        return self.put(np.ascontiguousarray(array))

    def empty(self, shape, dtype):
        return guarded(shape, dtype)

    def put(self, array):
        guard = guarded(array.shape, array.dtype)
        guard[...] = array
        return guard

    def get(self, array):
        return array


def gpu():
    """The installed plugin on the first GPU, as `qexport.nn` uses it."""
    import torch

    from qexport.nn.cuda import TorchMemory

    class Gpu(TorchMemory):
        name = "gpu"

        def put(self, array):
            if array.dtype != ml_dtypes.bfloat16:
                return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape).cuda()
            return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).cuda().view(torch.bfloat16)

        def get(self, tensor):
            if tensor.dtype != torch.bfloat16:
                return tensor.cpu().numpy()
            return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)

    return Gpu(torch.device("cuda", 0))


def split(combinations, small):
    """Parameters (device, *combination): all of them for `gpu`, those for which small(*combination) holds for `emulated`,
    where a call takes about a second. For `parametrize` with indirect=["device"]."""
    combinations = list(combinations)
    return [
        *(pytest.param("emulated", *c) for c in combinations if small(*c)),
        *(pytest.param("gpu", *c, marks=pytest.mark.gpu) for c in combinations),
    ]
