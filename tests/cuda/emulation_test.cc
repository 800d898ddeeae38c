// What the emulation has to notice: kernels that a GPU would run wrongly, each of which must end its process or leave its
// output unwritten.
#include <algorithm>
#include <numeric>

#include "planted.h"

namespace qexport {
namespace cuda {
namespace {

constexpr uint32_t kNothing = 0xffffffffu;  // as shared memory holds before anything is written
alignas(16) uint32_t output[4 * kWarp] = {}, input[2 * kWarp] = {};

// A copy for each thread, of which `kPending` groups are not waited for.
template <int kGroups, int kPending>
__global__ void copies() {
  uint32_t* const shared = dynamic_shared<uint32_t>();
  for (int i = 0; i < kGroups; ++i) {
    cp_async_16(shared + 4 * (kWarp * i + threadIdx.x), input, true);
    cp_async_commit();
  }
  cp_async_wait<kPending>();
  __syncwarp();
  output[threadIdx.x] = shared[4 * (kWarp * (kGroups - 1) + threadIdx.x)];
}
// Right if threads, or blocks, went on one behind the other.
__global__ void read_of_the_thread_before() {
  uint32_t* const shared = dynamic_shared<uint32_t>();
  shared[threadIdx.x] = threadIdx.x;
  output[threadIdx.x] = threadIdx.x > 0 && shared[threadIdx.x - 1] == kNothing;
}
__global__ void read_of_the_block_before() {
  if (threadIdx.x == 0) output[blockIdx.x] = blockIdx.x > 0 ? output[blockIdx.x - 1] + 1 : 1;
}
__global__ void shuffle_against_vote() {
  if (threadIdx.x % 2) {
    output[threadIdx.x] = __shfl_sync(kFullWarp, threadIdx.x, 0);
  } else {
    output[threadIdx.x] = __ballot_sync(kFullWarp, 1);
  }
}
__global__ void vote_of_half_a_warp() {
  if (threadIdx.x >= kWarp / 2) return;
  output[threadIdx.x] = __ballot_sync(kFullWarp, 1);
}
__global__ void write_behind_shared() { dynamic_shared<uint32_t>()[kPlantedBytes / 4 + threadIdx.x] = 0; }
__global__ void misaligned_store() {
  *reinterpret_cast<uint4*>(output + threadIdx.x) = uint4{0, 0, 0, 0};  // 4 bytes from one thread to the next
}
__global__ void barrier_of_two_numbers() { numbered_wait(1, threadIdx.x < kWarp ? 2 * kWarp : 3 * kWarp); }
__global__ void barrier_that_one_warp_misses() {
  if (threadIdx.x < kWarp) numbered_wait(1, 2 * kWarp);
}
// Products of ones by ones, sixteen of each; what is in the accumulators before or behind the wait.
enum class When { kEarly, kLate, kOtherRegisters };
template <When kWhen>
__global__ void product() {
  for (size_t i = threadIdx.x; i < kPlantedBytes / 4; i += blockDim.x) dynamic_shared<uint32_t>()[i] = 0x3c003c00;
  __syncthreads();
  float d[8][4] = {};
  uint32_t ones[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
  wgmma_fence();
  wgmma_values(d, ones, wgmma_matrix(dynamic_shared<char>(), kPlantedBytes), __half{});
  wgmma_commit();
  if (kWhen == When::kOtherRegisters) ones[0] = 0;
  const float early = d[7][3];
  wgmma_wait<0>();
  output[threadIdx.x] = static_cast<uint32_t>(kWhen == When::kEarly ? early : d[7][3]);
}

// What the last thread has read of its last copy.
uint32_t copied(void (*kernel)()) {
  Status status;
  launch(status, kernel, dim3(1), dim3(kWarp), kPlantedBytes, nullptr);
  return output[kWarp - 1];
}

// What kernels leave in output[0 .. 31], added up.
uint32_t sum_of_outputs(void (*kernel)(), unsigned blocks) {
  Status status;
  std::fill_n(output, kWarp, 0u);
  launch(status, kernel, dim3(blocks), dim3(kWarp), kPlantedBytes, nullptr);
  return std::accumulate(output, output + kWarp, 0u);
}

uint32_t product_of_ones(void (*kernel)()) {
  Status status;
  launch(status, kernel, dim3(1), dim3(4 * kWarp), kPlantedBytes, nullptr);
  return output[4 * kWarp - 1];
}

}  // namespace
}  // namespace cuda
}  // namespace qexport

int main() {
  using namespace qexport::cuda;
  expect(copied(copies<1, 0>) == 0, "a copy that was waited for is there");
  expect(copied(copies<2, 0>) == 0, "so is the last of two");
  expect(copied(copies<1, 1>) == kNothing, "one that was not waited for is not");
  expect(copied(copies<2, 1>) == kNothing, "nor the last of two, of which the first was");
  expect(sum_of_outputs(read_of_the_thread_before, 1) > 0, "threads run in any order");
  expect(sum_of_outputs(read_of_the_block_before, kWarp) != kWarp * (kWarp + 1) / 2, "and so do blocks");
  expect(dies(shuffle_against_vote, kWarp), "lanes meet at different operations");
  expect(dies(vote_of_half_a_warp, kWarp), "a vote after lanes have ended");
  expect(dies(write_behind_shared, kWarp), "a write behind the shared memory");
  expect(dies(misaligned_store, kWarp), "a store of 16 bytes that begins on 4");
  expect(dies(barrier_of_two_numbers, 3 * kWarp), "threads of a barrier that disagree on their number");
  expect(dies(barrier_that_one_warp_misses, 2 * kWarp), "a barrier that a warp never reaches");
  expect(product_of_ones(product<When::kLate>) == 16, "a product that was waited for is there");
  expect(product_of_ones(product<When::kEarly>) == 0, "and not before");
  expect(dies(product<When::kOtherRegisters>, 4 * kWarp), "registers that change while a product reads them");
  return wrong;
}
