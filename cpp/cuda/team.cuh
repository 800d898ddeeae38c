// Some warps of a block that work on one list or one node of a tree.
#pragma once

#include "common.cuh"

namespace qexport {
namespace cuda {

// All teams of a block are alike and meet at the same barriers, be there work for each of them or not.
struct Team {
  int thread, warps;
  __device__ __forceinline__ int threads() const { return warps * kWarp; }
  __device__ __forceinline__ int warp() const { return thread / kWarp; }
  __device__ __forceinline__ int lane() const { return thread % kWarp; }
  __device__ __forceinline__ void sync() const {
    if (warps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

__device__ __forceinline__ Team whole_block() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x) / kWarp};
}

}  // namespace cuda
}  // namespace qexport
