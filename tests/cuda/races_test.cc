// What emulation_races.h has to notice, and what it must not: kernels that nothing orders must end their process.
#include <memory>

#include "planted.h"

namespace qexport {
namespace cuda {
namespace {

uint32_t* memory;  // of the device, as much as 64 threads copy

__device__ uint32_t read_of_other(const uint32_t* from) { return from[threadIdx.x ^ 1]; }

template <class Sync>
__device__ void hand_on(const Sync& sync) {
  uint32_t* const shared = dynamic_shared<uint32_t>();
  shared[threadIdx.x] = threadIdx.x;
  sync();
  memory[threadIdx.x] = read_of_other(shared);
}
__global__ void without_a_barrier() {
  hand_on([] {});
}
__global__ void behind_a_shuffle() {
  hand_on([] { __shfl_sync(kFullWarp, 0, 0); });
}
__global__ void behind_syncwarp() {
  hand_on([] { __syncwarp(); });
}
__global__ void behind_syncthreads() {
  hand_on([] { __syncthreads(); });
}
__global__ void behind_syncthreads_or() {
  hand_on([] { __syncthreads_or(0); });
}
__global__ void behind_a_numbered_barrier() {
  hand_on([] { numbered_wait(1, 2 * kWarp); });
}

// What the first warp writes, the second reads.
template <class Arrive, class Wait>
__device__ void to_the_second_warp(const Arrive& arrive, const Wait& wait) {
  uint32_t* const shared = dynamic_shared<uint32_t>();
  uint64_t* const phase = dynamic_shared<uint64_t>(1024);
  if (threadIdx.x == 0) phase_init(phase, kWarp);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    shared[threadIdx.x] = 1;
    arrive(phase);
  } else {
    wait(phase);
    memory[threadIdx.x] = shared[threadIdx.x - kWarp];
  }
}
__global__ void behind_a_phase() {
  to_the_second_warp([](uint64_t* phase) { phase_arrive(phase); }, [](uint64_t* phase) { phase_wait(phase, 0); });
}
__global__ void beside_a_phase() {
  to_the_second_warp([](uint64_t* phase) { phase_arrive(phase); }, [](uint64_t*) {});
}
__global__ void behind_a_number() {
  to_the_second_warp([](uint64_t*) { numbered_arrive(2, 2 * kWarp); }, [](uint64_t*) { numbered_wait(2, 2 * kWarp); });
}

// A copy into what another thread reads, before it has or afterwards.
template <class Sync>
__device__ void copy_behind(const Sync& sync) {
  uint32_t* const shared = dynamic_shared<uint32_t>();
  for (int i = 0; i < 4; ++i) shared[4 * threadIdx.x + i] = 0;
  __syncthreads();
  const uint32_t before = read_of_other(shared);
  sync();
  cp_async_16(shared + 4 * threadIdx.x, memory + 4 * threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  memory[4 * threadIdx.x] = before + read_of_other(shared);
}
__global__ void copy_over_what_is_read() {
  copy_behind([] {});
}
__global__ void copy_over_what_was_read() {
  copy_behind([] { __syncthreads(); });
}
__global__ void copy_that_others_do_not_wait_for() {
  uint32_t* const shared = dynamic_shared<uint32_t>();
  cp_async_16(shared + 4 * threadIdx.x, memory, true);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
  memory[threadIdx.x + 4] = shared[4 * (threadIdx.x ^ 1)];
}
// A product reads shared memory until it is waited for.
template <bool kWaits>
__global__ void write_to_a_product() {
  uint32_t* const shared = dynamic_shared<uint32_t>();
  float d[8][4] = {};
  const uint64_t matrix = wgmma_matrix(dynamic_shared<char>(), kPlantedBytes);
  wgmma_keys(d, matrix, matrix, 0, __half{});
  wgmma_commit();
  if (kWaits) wgmma_wait<0>();
  __syncthreads();
  shared[threadIdx.x] = 1;
  __syncthreads();
  wgmma_wait<0>();
}

__global__ void own_shared_memory() {
  __shared__ uint32_t own[kWarp];
  dynamic_shared<uint32_t>()[threadIdx.x] = own[threadIdx.x % kWarp] = 1;
}
__global__ void one_word_of_all_blocks() {
  if (threadIdx.x == 0) *memory = 1;
}
__global__ void sum_of_all_blocks() { atomicAdd(memory, 1u); }
__global__ void flag_of_all_blocks() { *static_cast<volatile uint32_t*>(memory) = 1; }
__global__ void neighbours_of_one_word() {
  if (blockIdx.x < 2) reinterpret_cast<uint16_t*>(memory)[2 * threadIdx.x + blockIdx.x] = 1;
}

}  // namespace
}  // namespace cuda
}  // namespace qexport

int main() {
  using namespace qexport::cuda;
  const auto owner = std::make_unique<uint32_t[]>(512);
  memory = owner.get();
  expect(dies(without_a_barrier, kWarp), "a read of what another thread writes");
  expect(dies(behind_a_shuffle, kWarp), "shuffles order no memory");
  expect(!dies(behind_syncwarp, kWarp), "__syncwarp does");
  expect(!dies(behind_syncthreads, 2 * kWarp), "and __syncthreads");
  expect(!dies(behind_syncthreads_or, 2 * kWarp), "and __syncthreads_or");
  expect(!dies(behind_a_numbered_barrier, 2 * kWarp), "and a numbered barrier");
  expect(!dies(behind_a_number, 2 * kWarp), "also for who does not wait");
  expect(!dies(behind_a_phase, 2 * kWarp), "a phase orders what was before it");
  expect(dies(beside_a_phase, 2 * kWarp), "but only for who waits");
  expect(dies(copy_over_what_is_read, 2 * kWarp), "a copy may write as soon as it is started");
  expect(!dies(copy_over_what_was_read, 2 * kWarp), "behind a barrier it may");
  expect(dies(copy_that_others_do_not_wait_for, 2 * kWarp), "and as late as it is waited for");
  expect(dies(write_to_a_product<false>, 4 * kWarp), "products read until they are waited for");
  expect(!dies(write_to_a_product<true>, 4 * kWarp), "and no longer");
  expect(!dies(own_shared_memory, kWarp, 4), "each block has shared memory of its own");
  expect(dies(one_word_of_all_blocks, kWarp, 2), "blocks that write the same word");
  expect(!dies(one_word_of_all_blocks, kWarp, 1, 2), "as the kernels of a stream may");
  expect(!dies(sum_of_all_blocks, kWarp, 2), "or atomic operations");
  expect(!dies(flag_of_all_blocks, kWarp, 2), "or volatile ones");
  expect(!dies(neighbours_of_one_word, kWarp, 2), "and halves of a word are two places");
  return wrong;
}
