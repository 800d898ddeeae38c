#include <algorithm>
#include <numeric>
#include <utility>

#include "emulation_threads.h"

namespace emulation {

namespace {

constexpr size_t kBehind = 1024;    // bytes of shared memory behind what a kernel asked for
constexpr size_t kApart = 17 * 64;  // of stacks' ends, which would share a few lines of the cache otherwise
constexpr char kUnwritten = static_cast<char>(0xff);  // memory that a kernel does not fill: here NaN of every type

}  // namespace

Block* block = nullptr;
char shared[227 * 1024 + kBehind];

namespace {

std::vector<std::unique_ptr<char[]>> stacks;  // of earlier blocks, to be used again
const std::function<void()>* work = nullptr;

Warp& own_warp() { return block->warps[static_cast<size_t>(block->now->warp)]; }

void enter() {
  (*work)();
  if (!block->now->products.empty()) die("a thread ends before its products");
  block->now->done = true;
  block->meeting.leave();
  if (own_warp().meeting.arrived) die("a lane ends while others of its warp wait for it");
  own_warp().meeting.leave();
  __builtin_longjmp(block->scheduler, 1);
}

// What a kernel calls here is not a part of it.
struct Unwatched {
  Thread& thread = *block->now;
  const bool before = std::exchange(thread.watched, false);
  ~Unwatched() { thread.watched = before; }
};

// Of what is under way, in order, all but the newest groups.
template <class Work>
std::vector<Work> take_done(std::vector<Work>& all, std::vector<size_t>& groups, int pending) {
  if (groups.size() <= static_cast<size_t>(pending)) return {};
  const auto last = groups.end() - pending;
  const size_t count = last[-1];
  const auto end = all.begin() + static_cast<std::ptrdiff_t>(count);
  std::vector<Work> done(all.begin(), end);
  all.erase(all.begin(), end);
  groups.erase(groups.begin(), last);
  for (size_t& group : groups) group -= count;
  return done;
}

// Lets a thread run until it waits or ends.
[[gnu::noinline]] void resume(Thread& thread) {
  block->now = &thread;
  if (__builtin_setjmp(block->scheduler)) {
    block->now = nullptr;
    return;
  }
  if (thread.started) __builtin_longjmp(thread.here, 1);
  thread.started = true;
  setcontext(&thread.start);
}

[[gnu::noinline]] void yield() {
  if (!__builtin_setjmp(block->now->here)) __builtin_longjmp(block->scheduler, 1);
}

// Waits until the meeting that is under way is over.
void await(const Meeting& meeting) {
  Thread& self = *block->now;
  self.waits = &meeting, self.generation = meeting.generation;
  yield();
  self.waits = nullptr;
}

}  // namespace

void die(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u,%u,%u thread %u)\n", what, block->index.x, block->index.y, block->index.z,
               block->now ? block->now->index.x : 0);
  std::abort();
}

void arrive(Meeting& meeting, Order order) {
  const Unwatched unwatched;
  if (order == Order::kMemory) {
    Clocks& clocks = meeting.clocks[meeting.generation % 2];
    if (meeting.arrived == 0) clocks.clear();
    release(clocks);
  }
  if (++meeting.arrived == meeting.running) meeting.open();
}
void meet(Meeting& meeting, Order order) {
  const Unwatched unwatched;
  const uint64_t now = meeting.generation;
  arrive(meeting, order);
  if (meeting.generation == now) await(meeting);
  if (order == Order::kMemory) acquire(meeting.clocks[now % 2]);
}

void barrier() { meet(block->meeting); }
int barrier_or(int predicate) {
  static int any[2];
  // One word per parity of the barrier; the first thread behind a barrier clears the other.
  const int slot = static_cast<int>(block->meeting.generation / 2 % 2);
  if (predicate) any[slot] = 1;
  barrier();
  const int result = any[slot];
  barrier();
  any[slot] = 0;
  return result;
}
void warp_meet(const char* operation, Order order) {
  const Unwatched unwatched;
  Warp& warp = own_warp();
  if (warp.meeting.running != 32) die("a warp operation after some lanes have ended");
  if (warp.meeting.arrived == 0) warp.operation = operation;
  if (warp.operation != operation && std::strcmp(warp.operation, operation))
    die("lanes of a warp meet at different operations");
  meet(warp.meeting, order);
}
const Slot* exchange(const char* operation, const void* value, size_t size) {
  const Unwatched unwatched;
  Warp& warp = own_warp();
  Slot* const slots = warp.slot[warp.meeting.generation % 2];
  std::memcpy(slots[block->now->lane], value, size);
  warp_meet(operation, Order::kNone);
  return slots;
}

void multiply(const char* operation, const Fragments& own, void (*product)(const Slot*)) {
  const bool last = own_warp().meeting.arrived == 31;
  const Slot* const lanes = exchange(operation, own);
  if (last) product(lanes);
}

void phase_init(const void* barrier, int arrivals) {
  const Unwatched unwatched;
  block->phases[barrier].running = static_cast<unsigned>(arrivals);
}
void phase_arrive(const void* barrier) {
  const Unwatched unwatched;
  arrive(block->phases.at(barrier));
}
void phase_wait(const void* barrier, int parity) {
  const Unwatched unwatched;
  const Meeting& phases = block->phases.at(barrier);
  if (phases.generation % 2 == static_cast<unsigned>(parity)) await(phases);
  acquire(phases.clocks[parity]);
}
Meeting& numbered(int id, int threads) {
  const Unwatched unwatched;
  if (id < 1 || id > 15 || threads % 32) die("numbered barriers are 1 to 15, of whole warps");
  Meeting& barrier = block->numbered[id];
  if (barrier.arrived && barrier.running != static_cast<unsigned>(threads))
    die("a numbered barrier of different numbers of threads");
  barrier.running = static_cast<unsigned>(threads);
  return barrier;
}

void start_copy(void* to, const void* from) {
  const Unwatched unwatched;
  const Copy copy{to, from, __builtin_return_address(0), block->now->clocks};
  note_copy(copy, true);
  block->now->copies.push_back(copy);
}
void close_copies() {
  const Unwatched unwatched;
  block->now->groups.push_back(block->now->copies.size());
}
void finish_copies(int pending) {
  const Unwatched unwatched;
  for (const Copy& copy : take_done(block->now->copies, block->now->groups, pending)) {
    block->now->since = &copy.started;
    note_copy(copy, false);
    block->now->since = nullptr;
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
}

void start_product(const Product& product) {
  const Unwatched unwatched;
  warp_meet("a product of a warpgroup", Order::kNone);
  block->now->products.push_back(product);
  block->now->products.back().started = block->now->clocks;
}
void close_products() {
  const Unwatched unwatched;
  block->now->product_groups.push_back(block->now->products.size());
}
void finish_products(int pending) {
  const Unwatched unwatched;
  warp_meet("a wait for products", Order::kNone);
  for (const Product& product : take_done(block->now->products, block->now->product_groups, pending)) {
    if (product.registers && std::memcmp(product.registers, product.kept, sizeof(product.kept)))
      die("registers of a product have changed before it was waited for");
    block->now->since = &product.started, block->now->watched = true;
    product.run(product, product.d);
    block->now->since = nullptr, block->now->watched = false;
  }
}

void run_block(Block& own, size_t shared_bytes, const std::function<void()>& body) {
  block = &own, work = &body;
  std::fill_n(shared, shared_bytes + kBehind, kUnwritten);
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
    thread.start.uc_stack.ss_size = kStackBytes - i % 64 * kApart;
    makecontext(&thread.start, enter, 0);
    ++block->meeting.running, ++block->warps[i / 32].meeting.running;
  }
  begin_block_races(count);
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
  if (std::any_of(shared + shared_bytes, shared + shared_bytes + kBehind, [](char byte) { return byte != kUnwritten; }))
    die("a write behind the shared memory");
  for (Thread& thread : block->threads) stacks.push_back(std::move(thread.stack));
  block = nullptr;
}

}  // namespace emulation
