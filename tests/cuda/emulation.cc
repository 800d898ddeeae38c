#undef _FORTIFY_SOURCE  // which takes a jump to another stack for an error
#include <algorithm>
#include <numeric>

#include "emulation_threads.h"

namespace emulation {

Block* block = nullptr;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
std::vector<std::unique_ptr<char[]>> stacks;  // of earlier blocks, to be used again
const std::function<void()>* work = nullptr;

void enter() {
  (*work)();
  block->now->done = true;
  block->meeting.leave();
  if (own_warp().meeting.arrived) die("a lane ends while others of its warp wait for it");
  own_warp().meeting.leave();
  std::longjmp(block->scheduler, 1);
}

// Lets a thread run until it waits or ends.
void resume(Thread& thread) {
  block->now = &thread;
  if (setjmp(block->scheduler)) return;
  if (thread.started) std::longjmp(thread.here, 1);
  thread.started = true;
  setcontext(&thread.start);
}

}  // namespace

void yield() {
  if (!setjmp(block->now->here)) std::longjmp(block->scheduler, 1);
}

char* shared_memory() {
  const uintptr_t address = reinterpret_cast<uintptr_t>(block->shared.data());
  return reinterpret_cast<char*>((address + kSharedAlign - 1) / kSharedAlign * kSharedAlign);
}

void check_shared(size_t bytes) {
  const char *const end = shared_memory() + bytes, *const all = block->shared.data() + block->shared.size();
  if (std::any_of(end, all, [](char byte) { return byte != kUnwritten; })) die("a write behind the shared memory");
}

void Thread::finish_copies(size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (copies[i].from) {
      std::memcpy(copies[i].to, copies[i].from, 16);
    } else {
      std::memset(copies[i].to, 0, 16);
    }
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(count));
  while (!groups.empty() && groups.front() <= count) groups.erase(groups.begin());
  for (size_t& group : groups) group -= count;
}

void run_block(const std::function<void()>& body) {
  work = &body;
  const unsigned count = block->size.x * block->size.y * block->size.z;
  block->threads.resize(count);
  block->warps.resize((count + 31) / 32);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread.index = dim3(i % block->size.x, i / block->size.x % block->size.y, i / block->size.x / block->size.y);
    thread.lane = static_cast<int>(i % 32), thread.warp = static_cast<int>(i / 32);
    if (stacks.empty()) stacks.emplace_back(new char[kStackBytes]);
    thread.stack = std::move(stacks.back());
    stacks.pop_back();
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.start, enter, 0);
    ++block->meeting.running, ++block->warps[i / 32].meeting.running;
  }
  std::vector<unsigned> warps(block->warps.size());
  std::iota(warps.begin(), warps.end(), 0u);
  for (unsigned left = count; left > 0;) {
    bool progress = false;
    std::shuffle(warps.begin(), warps.end(), block->chance);
    for (const unsigned warp : warps) {
      const auto chance = static_cast<unsigned>(block->chance());
      for (unsigned k = 0; k < 32; ++k) {
        const unsigned i = warp * 32 + (chance / 32 + k * (chance | 1)) % 32;  // an odd step meets every lane
        if (i >= count) continue;
        Thread& thread = block->threads[i];
        if (thread.done || (thread.waits && thread.waits->generation == thread.generation)) continue;
        progress = true;
        resume(thread);
        left -= thread.done;
      }
    }
    if (!progress) die("threads wait for each other: a barrier or warp operation that not all reach");
  }
  for (Thread& thread : block->threads) stacks.push_back(std::move(thread.stack));
}

}  // namespace emulation
