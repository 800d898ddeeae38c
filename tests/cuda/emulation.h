// CUDA kernels on the CPU, for tests without a GPU: the threads of a block run as fibers of one thread, switching at
// barriers and warp operations, in an order that changes from round to round so that a missing barrier shows as a wrong
// result, as does an asynchronous copy that nobody waited for. Needs the headers of a CUDA toolkit (types alone), no CUDA
// library and no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __align__
#define __align__(n) alignas(n)
#undef __noinline__
#define __noinline__
#undef __restrict__
#define __restrict__ __restrict

namespace emulation {

// Where the threads of a block or of a warp wait for each other. Those that have ended do not count.
struct Meeting {
  unsigned running = 0, arrived = 0;
  uint64_t generation = 0;  // how often all have met

  void open() { arrived = 0, ++generation; }
  void leave() {
    if (--running > 0 && arrived == running) open();
  }
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  dim3 index;
  int lane, warp;
  ucontext_t start;
  std::jmp_buf here;  // where it goes on; unlike swapcontext, longjmp asks nothing of the kernel
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  const Meeting* waits = nullptr;  // for this meeting to be over, the generation of which is
  uint64_t generation = 0;
  std::vector<Copy> copies;    // that have not arrived, in order
  std::vector<size_t> groups;  // how many of them were started when each group was closed

  void finish_copies(size_t count);
};

struct Warp {
  Meeting meeting;
  const char* operation = "";  // that its lanes meet at
  uint64_t slot[2][32][2];     // by parity of the meeting: a thread is never two of them ahead
};

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<char> shared;
  Meeting meeting;
  std::map<const void*, Meeting> phases;  // barriers that count arrivals, by their place in shared memory
  std::map<int, Meeting> numbered;
  std::jmp_buf scheduler;
  Thread* now = nullptr;
};

extern Block* block;

void yield();

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u,%u,%u thread %u)\n", what, block->index.x, block->index.y, block->index.z,
               block->now ? block->now->index.x : 0);
  std::abort();
}

inline void arrive(Meeting& meeting) {
  if (++meeting.arrived == meeting.running) meeting.open();
}
// Waits until the meeting that is under way is over.
inline void await(const Meeting& meeting) {
  Thread& self = *block->now;
  self.waits = &meeting, self.generation = meeting.generation;
  yield();
  self.waits = nullptr;
}
inline void meet(Meeting& meeting) {
  const uint64_t now = meeting.generation;
  arrive(meeting);
  if (meeting.generation == now) await(meeting);
}

inline void barrier() { meet(block->meeting); }
inline Warp& own_warp() { return block->warps[static_cast<size_t>(block->now->warp)]; }
inline void warp_meet(const char* operation) {
  Warp& warp = own_warp();
  if (warp.meeting.running != 32) die("a warp operation after some lanes have ended");
  if (warp.meeting.arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation)) die("lanes of a warp meet at different operations");
  meet(warp.meeting);
}

// Every lane gives 16 bytes; returns the slots of all lanes.
template <class T>
const uint64_t (*exchange(const char* operation, const T& value))[2] {
  static_assert(sizeof(T) <= 16);
  Warp& warp = own_warp();
  auto& slots = warp.slot[warp.meeting.generation % 2];
  std::memcpy(slots[block->now->lane], &value, sizeof(T));
  warp_meet(operation);
  return slots;
}
template <class T>
T from_slot(const uint64_t (&slot)[2]) {
  T value;
  std::memcpy(&value, slot, sizeof(T));
  return value;
}
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) die("warp operation without the full mask");
}

constexpr size_t kSharedAlign = 1024;
constexpr char kUnwritten = static_cast<char>(0xff);  // memory that a kernel does not fill: here NaN of every type
void run_block(const std::function<void()>& body);
char* shared_memory();
void check_shared(size_t bytes);  // nothing was written behind them

}  // namespace emulation

#define threadIdx (emulation::block->now->index)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->size)
#define gridDim (emulation::block->grid)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::check_mask(mask);
  emulation::warp_meet("__syncwarp");
}
inline int __syncthreads_or(int predicate) {
  static int any[2];
  // One word per parity of the barrier; the first thread behind a barrier clears the other.
  const int slot = static_cast<int>(emulation::block->meeting.generation / 2 % 2);
  if (predicate) any[slot] = 1;
  emulation::barrier();
  const int result = any[slot];
  emulation::barrier();
  any[slot] = 0;
  return result;
}
namespace emulation {
template <class T>
T shuffle(const char* operation, unsigned mask, const T& value, int lane, int width) {
  check_mask(mask);
  const auto* slots = exchange(operation, value);
  return from_slot<T>(slots[block->now->lane / width * width + (lane & (width - 1))]);
}
inline unsigned vote(const char* operation, unsigned mask, int predicate) {
  check_mask(mask);
  const auto* slots = exchange(operation, predicate ? 1 : 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= from_slot<int>(slots[i]) ? 1u << i : 0u;
  return bits;
}
}  // namespace emulation
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulation::shuffle("__shfl_sync", mask, value, lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::block->now->lane % width ^ other, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = emulation::block->now->lane % width, at = own - static_cast<int>(delta);
  return emulation::shuffle("__shfl_up_sync", mask, value, at < 0 ? own : at, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::vote("__ballot_sync", mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return emulation::vote("__any_sync", mask, predicate) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) {
  volatile float y = a * b;
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
template <class T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p = static_cast<T>(old + x);
  return old;
}
template <class T>
T atomicMax(T* p, T x) {
  const T old = *p;
  *p = x > old ? x : old;
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;

namespace qexport {
namespace cuda {

struct Status;
struct Device {
  int capability, multiprocessors, shared_bytes;
};

// A Hopper unless QEXPORT_EMULATED_CAPABILITY says otherwise, small enough that persistent grids loop.
inline Device device_of_tests() {
  const auto number = [](const char* name, int otherwise) {
    const char* const text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
  };
  const int capability = number("QEXPORT_EMULATED_CAPABILITY", 90);
  // The most that a block may have, of the CUDA programming guide's table of compute capabilities.
  const bool roomy = capability == 80 || capability == 87, least = capability < 90 || capability >= 120;
  const int kib = capability < 80 ? 64 : roomy ? 163 : least ? 99 : 227;
  return {capability, number("QEXPORT_EMULATED_MULTIPROCESSORS", 4), kib * 1024};
}

inline char* dynamic_shared_bytes() { return emulation::shared_memory(); }

// Template bodies see Status once it is complete.
template <class AnyStatus, class... Params, class... Args>
void launch(AnyStatus& status, void (*kernel)(Params...), dim3 grid, dim3 size, size_t shared_bytes, void*, Args... args) {
  if (!status.ok()) return;
  if (shared_bytes > static_cast<size_t>(device_of_tests().shared_bytes)) return status.fail("too much shared memory");
  if (size.x * size.y * size.z > 1024) return status.fail("too many threads");
  if (grid.x > INT32_MAX || std::max(grid.y, grid.z) > UINT16_MAX) return status.fail("too many blocks");
  const std::tuple<Params...> values(static_cast<Params>(args)...);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        emulation::Block block{};
        block.index = dim3(x, y, z), block.size = size, block.grid = grid;
        block.shared.assign(shared_bytes + 2 * emulation::kSharedAlign, emulation::kUnwritten);
        emulation::block = &block;
        emulation::run_block([&] { std::apply(kernel, values); });
        emulation::check_shared(shared_bytes);
        emulation::block = nullptr;
      }
    }
  }
}
template <class AnyStatus>
void fill_zero(AnyStatus& status, void* data, size_t bytes, void*) {
  if (status.ok() && bytes) std::memset(data, 0, bytes);
}
template <class AnyStatus>
Device current_device(AnyStatus&) {
  return device_of_tests();
}

inline uint32_t join_halves(uint16_t low, uint16_t high) { return uint32_t{high} << 16 | low; }
template <class T>
float half_at(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, 2);
  return static_cast<float>(value);
}

// All lanes' fragments are gathered, and every lane computes its own four elements.
template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Pair {
    uint32_t x[4];
  };
  float A[16][16], B[16][8];
  Pair pair{{a[0], a[1], a[2], a[3]}};
  const auto* left = emulation::exchange("mma_16816", pair);
  for (int lane = 0; lane < 32; ++lane) {
    const Pair p = emulation::from_slot<Pair>(left[lane]);
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) A[lane / 4 + i % 2 * 8][2 * (lane % 4) + e + i / 2 * 8] = half_at<T>(p.x[i], e);
    }
  }
  pair = {{b[0], b[1], 0, 0}};
  const auto* right = emulation::exchange("mma_16816", pair);
  for (int lane = 0; lane < 32; ++lane) {
    const Pair p = emulation::from_slot<Pair>(right[lane]);
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) B[2 * (lane % 4) + e + i * 8][lane / 4] = half_at<T>(p.x[i], e);
    }
  }
  const int self = emulation::block->now->lane;
  for (int i = 0; i < 4; ++i) {
    const int row = self / 4 + i / 2 * 8, column = 2 * (self % 4) + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
    c[i] = sum;
  }
}

inline float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }
// What a unit drops, of its operands and of its sums.
inline void mma_1688(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Four {
    uint32_t x[4];
  };
  double A[16][8], B[8][8];
  const auto* left = emulation::exchange("mma_1688", Four{{a[0], a[1], a[2], a[3]}});
  for (int lane = 0; lane < 32; ++lane) {
    const Four own = emulation::from_slot<Four>(left[lane]);
    for (int i = 0; i < 4; ++i) A[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = tf32(own.x[i]);
  }
  const auto* right = emulation::exchange("mma_1688", Four{{b0, b1, 0, 0}});
  for (int lane = 0; lane < 32; ++lane) {
    const Four own = emulation::from_slot<Four>(right[lane]);
    for (int i = 0; i < 2; ++i) B[lane % 4 + i * 4][lane / 4] = tf32(own.x[i]);
  }
  const int self = emulation::block->now->lane;
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8; ++k) sum += A[self / 4 + i / 2 * 8][k] * B[k][2 * (self % 4) + i % 2];
    c[i] = static_cast<float>(sum);
    if (std::fabs(c[i]) > std::fabs(sum)) c[i] = std::nextafter(c[i], 0.0f);
  }
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
  const auto* slots = emulation::exchange("ldmatrix", row);
  const int self = emulation::block->now->lane;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r_index = transposed ? 2 * (self % 4) + e : self / 4, c_index = transposed ? self / 4 : 2 * (self % 4) + e;
      const char* base = emulation::from_slot<const char*>(slots[m * 8 + r_index]);
      if (reinterpret_cast<uintptr_t>(base) % 16) emulation::die("ldmatrix: a row is not aligned to 16 bytes");
      std::memcpy(&pair[e], base + 2 * c_index, 2);
    }
    r[m] = join_halves(pair[0], pair[1]);
  }
  emulation::warp_meet("ldmatrix");  // nobody writes the rows before all have read them
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, true); }
// Copies arrive when they are waited for, as late as they may.
inline void cp_async_16(void* dst, const void* src, bool valid) {
  if (reinterpret_cast<uintptr_t>(dst) % 16 || reinterpret_cast<uintptr_t>(src) % 16)
    emulation::die("cp_async: not aligned");
  emulation::block->now->copies.push_back({dst, valid ? src : nullptr});
}
inline void cp_async_commit() {
  emulation::Thread& self = *emulation::block->now;
  self.groups.push_back(self.copies.size());
}
template <int kPending>
void cp_async_wait() {
  const std::vector<size_t>& groups = emulation::block->now->groups;
  if (groups.size() > kPending) emulation::block->now->finish_copies(groups[groups.size() - 1 - kPending]);
}
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

inline void phase_init(uint64_t* barrier, int arrivals) {
  emulation::block->phases[barrier].running = static_cast<unsigned>(arrivals);
}
inline void phase_arrive(uint64_t* barrier) { emulation::arrive(emulation::block->phases.at(barrier)); }
inline void phase_arrive_after_copies(uint64_t* barrier) {
  emulation::Thread& self = *emulation::block->now;
  self.finish_copies(self.copies.size());
  phase_arrive(barrier);
}
inline void phase_wait(uint64_t* barrier, int parity) {
  const emulation::Meeting& phases = emulation::block->phases.at(barrier);
  if (phases.generation % 2 == static_cast<unsigned>(parity)) emulation::await(phases);
}
inline emulation::Meeting& numbered_barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32) emulation::die("numbered barriers are 1 to 15, of whole warps");
  emulation::Meeting& barrier = emulation::block->numbered[id];
  if (barrier.arrived && barrier.running != static_cast<unsigned>(threads))
    emulation::die("a numbered barrier of different numbers of threads");
  barrier.running = static_cast<unsigned>(threads);
  return barrier;
}
inline void numbered_wait(int id, int threads) { emulation::meet(numbered_barrier(id, threads)); }
inline void numbered_arrive(int id, int threads) { emulation::arrive(numbered_barrier(id, threads)); }

}  // namespace cuda
}  // namespace qexport
