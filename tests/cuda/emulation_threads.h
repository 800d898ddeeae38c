// The threads of a block as fibers of one thread: where they wait for each other, and what the lanes of a warp exchange.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

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
  std::mt19937 chance;  // of the order in which threads go on
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
  if (warp.operation != operation && std::strcmp(warp.operation, operation))
    die("lanes of a warp meet at different operations");
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
