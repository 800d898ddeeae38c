// Functions of these headers that CUDA kernels call too.
#pragma once

#if defined(__CUDACC__)
#define QEXPORT_HOST_DEVICE __host__ __device__
#else
#define QEXPORT_HOST_DEVICE
#endif
