// CUDA kernels on the CPU, for tests without a GPU: the threads of a block run as fibers of one thread, switching at
// barriers and warp operations. They go on in any order, as the blocks do, so that a missing barrier shows as a wrong
// result, as does an asynchronous copy that nobody waited for. Needs the headers of a CUDA toolkit (types alone), no CUDA
// library and no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "emulation_builtins.h"
#include "emulation_threads.h"
#include "emulation_wgmma.h"

namespace qexport {
namespace cuda {

struct Status;
struct Device {
  int capability, multiprocessors, shared_bytes;
};

inline int number_of_tests(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

// A Hopper unless QEXPORT_EMULATED_CAPABILITY says otherwise, small enough that persistent grids loop.
inline Device device_of_tests() {
  const int capability = number_of_tests("QEXPORT_EMULATED_CAPABILITY", 90);
  // The most that a block may have, of the CUDA programming guide's table of compute capabilities.
  const bool roomy = capability == 80 || capability == 87, least = capability < 90 || capability >= 120;
  const int kib = capability < 80 ? 64 : roomy ? 163 : least ? 99 : 227;
  return {capability, number_of_tests("QEXPORT_EMULATED_MULTIPROCESSORS", 4), kib * 1024};
}

inline char* dynamic_shared_bytes() { return emulation::shared; }

// Template bodies see Status once it is complete.
template <class AnyStatus, class... Params, class... Args>
void launch(AnyStatus& status, void (*kernel)(Params...), dim3 grid, dim3 size, size_t shared_bytes, void*, Args... args) {
  if (!status.ok()) return;
  if (shared_bytes > static_cast<size_t>(device_of_tests().shared_bytes)) return status.fail("too much shared memory");
  if (size.x * size.y * size.z > 1024) return status.fail("too many threads");
  if (grid.x > INT32_MAX || std::max(grid.y, grid.z) > UINT16_MAX) return status.fail("too many blocks");
  emulation::begin_kernel();
  const std::tuple<Params...> values(static_cast<Params>(args)...);
  // In any order, but the same in every run of a test.
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  const auto seed = static_cast<unsigned>(number_of_tests("QEXPORT_EMULATED_SEED", 0));
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (const uint64_t at : order) {
    emulation::Block block{};
    block.index = dim3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                       static_cast<unsigned>(at / grid.x / grid.y));
    block.size = size, block.grid = grid, block.chance.seed(seed + static_cast<unsigned>(at));
    emulation::run_block(block, shared_bytes, [&] { std::apply(kernel, values); });
  }
}
template <class AnyStatus, class... Arguments>
void launch_overlapping(AnyStatus& status, const Device&, Arguments... arguments) {
  launch(status, arguments...);
}
inline void let_next_begin() {}
inline void wait_for_kernel_before() {}
template <class AnyStatus>
void fill_zero(AnyStatus& status, void* data, size_t bytes, void*) {
  if (status.ok() && bytes) std::memset(data, 0, bytes);
}
template <class AnyStatus>
Device current_device(AnyStatus&) {
  return device_of_tests();
}

}  // namespace cuda
}  // namespace qexport
