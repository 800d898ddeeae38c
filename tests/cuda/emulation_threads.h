// The threads of a block as fibers of one thread: where they wait for each other, and what the lanes of a warp exchange.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "emulation_races.h"

namespace emulation {

// Where the threads of a block or of a warp wait for each other. Those that have ended do not count.
struct Meeting {
  unsigned running = 0, arrived = 0;
  uint64_t generation = 0;  // how often all have met
  Clocks clocks[2];         // of those who arrived, by parity of the generation: nobody is two of them ahead

  void open() { arrived = 0, ++generation; }
  void leave() {
    if (--running > 0 && arrived == running) open();
  }
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  const void* code;  // that started it
  Clocks started;    // what had happened then
};

// A product of a warpgroup: of one thread, its two rows.
struct Product {
  void (*run)(const Product&, float* d);
  float* d;
  const uint32_t* registers;  // that hold the left matrix, of which `rows` are made; null: it lies in shared memory, at `a`
  uint32_t kept[4];           // what is in them
  uint16_t rows[2][16];
  uint64_t a, b;
  bool adds;
  Clocks started;
};

using Jump = void* [5];  // of __builtin_setjmp: it saves no registers, and unlike swapcontext asks nothing of the kernel

struct Thread {
  dim3 index;
  int lane, warp;
  ucontext_t start;
  Jump here;  // where it goes on
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  bool watched = true;             // its accesses are those of the kernel, and not of what is called below
  const Meeting* waits = nullptr;  // for this meeting to be over, the generation of which is
  uint64_t generation = 0;
  std::vector<Copy> copies;            // that have not arrived, in order
  std::vector<size_t> groups;          // how many of them were started when each group was closed
  std::vector<Product> products;       // as copies
  std::vector<size_t> product_groups;  // as groups
  Clocks clocks;
  const Clocks* since = nullptr;  // those when what it does now was started; null: they are its own
};

struct Warp {
  Meeting meeting;
  const char* operation = "";  // that its lanes meet at
  uint64_t slot[2][32][4];     // by parity of the meeting: a thread is never two of them ahead
};

constexpr size_t kStackBytes = 256 * 1024;

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting meeting;
  std::map<const void*, Meeting> phases;  // barriers that count arrivals, by their place in shared memory
  std::map<int, Meeting> numbered;
  Jump scheduler;
  std::mt19937 chance;  // of the order in which threads go on
  Thread* now = nullptr;
};

extern Block* block;

[[noreturn]] void die(const char* what);

// What memory a meeting orders: all of its threads', or none, as that of shuffles, votes and products.
enum class Order { kNone, kMemory };
void arrive(Meeting& meeting, Order order = Order::kMemory);
void meet(Meeting& meeting, Order order = Order::kMemory);
void warp_meet(const char* operation, Order order);
void barrier();
int barrier_or(int predicate);
// A barrier that counts arrivals, by its place in shared memory, and one that has a number.
void phase_init(const void* barrier, int arrivals);
void phase_arrive(const void* barrier);
void phase_wait(const void* barrier, int parity);
Meeting& numbered(int id, int threads);
// 16 bytes on their way, from null of zeros.
void start_copy(void* to, const void* from);
void close_copies();              // what was started is a group
void finish_copies(int pending);  // all but the newest groups

void start_product(const Product& product);
void close_products();
void finish_products(int pending);

// Every lane gives up to 32 bytes; returns the slots of all lanes.
using Slot = uint64_t[4];
const Slot* exchange(const char* operation, const void* value, size_t size);
template <class T>
const Slot* exchange(const char* operation, const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot));
  return exchange(operation, &value, sizeof(T));
}
template <class T>
T from_slot(const Slot& slot) {
  T value;
  std::memcpy(&value, slot, sizeof(T));
  return value;
}
// What a lane gives to a product of its warp: its parts of both matrices, and its four accumulators.
struct Fragments {
  uint32_t a[4], b[2];
  float* c;
};
void multiply_half(const Slot* lanes);  // m16n8k16
void multiply_bfloat16(const Slot* lanes);
void multiply_tf32(const Slot* lanes);  // m16n8k8
// The lane that comes last makes the product.
void multiply(const char* operation, const Fragments& own, void (*product)(const Slot*));
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) die("warp operation without the full mask");
}

// Its dynamic memory, of which the most that any device has.
alignas(1024) extern char shared[];
void run_block(Block& own, size_t shared_bytes, const std::function<void()>& body);

}  // namespace emulation
