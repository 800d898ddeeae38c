#include "emulation_races.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <unordered_map>

#include "emulation_threads.h"

namespace emulation {
namespace {

struct Access {
  uint32_t block, clock;  // of all blocks that have run; when, by the clock of its thread
  uint16_t thread;
  uint8_t bytes;  // a bit for each of the eight
  bool writes, atomic;
  const void* code;
};
using Word = std::array<Access, 4>;  // the last accesses to eight bytes: of more readers than that, some are forgotten

constexpr uintptr_t kPage = 4096;
constexpr size_t kPages = 8192;  // as many are kept, of 48 KiB each; then all are forgotten
std::unordered_map<uintptr_t, std::unique_ptr<Word[]>> pages;
uint32_t number = 0, first_of_kernel = 0;  // of this block and of the first block of this kernel

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t at) const { return at >= begin && at < end; }
};

// Where the variables of this library lie: shared memory is among them, and nothing else that kernels write.
Range own_variables() {
  Range found;
  const auto look = [](dl_phdr_info* info, size_t, void* data) {
    Range all;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      if (part.p_type != PT_LOAD || !(part.p_flags & PF_W)) continue;
      all.begin = info->dlpi_addr + part.p_vaddr, all.end = all.begin + part.p_memsz;
      if (all.holds(reinterpret_cast<uintptr_t>(&number))) *static_cast<Range*>(data) = all;
    }
    return 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

Word& word_at(uintptr_t at) {
  static std::array<std::pair<uintptr_t, Word*>, 1024> recent;
  const uintptr_t page = at / kPage;
  auto& [known, words] = recent[page % recent.size()];
  if (known != page || !words) {
    if (pages.size() > kPages) pages.clear(), recent.fill({});
    auto& place = pages[page];
    if (!place) place.reset(new Word[kPage / 8]());
    known = page, words = place.get();
  }
  return words[at % kPage / 8];
}

// "file:line" of what is compiled into an address, with what it is inlined into.
std::string source_of(const void* code) {
  Dl_info library{};
  if (!dladdr(code, &library)) return "?";
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase) - 1;
  char command[600], line[400];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' %#tx", library.dli_fname, offset);
  std::string text;
  if (FILE* const lines = popen(command, "r")) {
    while (std::fgets(line, sizeof(line), lines)) text += "    " + std::string(line);
    pclose(lines);
  }
  return text;
}

[[noreturn]] void report(const Access& now, const Access& before, bool is_shared, uintptr_t at) {
  const auto verb = [](const Access& access) { return access.writes ? "writes" : "reads"; };
  std::fprintf(stderr, "thread %u %s what thread %u%s %s, %s memory at %#zx, and nothing orders them:\n%s  and\n%s",
               now.thread, verb(now), before.thread, before.block == now.block ? "" : " of another block", verb(before),
               is_shared ? "shared" : "global", at, source_of(now.code).c_str(), source_of(before.code).c_str());
  die("a race");
}

void note_word(Word& word, const Access& now, bool is_shared, uintptr_t at) {
  const Clocks& clocks = block->now->since ? *block->now->since : block->now->clocks;
  Access* place = nullptr;
  for (Access& before : word) {
    // A block has shared memory of its own, and a kernel begins when all is done of the one before.
    if (before.bytes && before.block < (is_shared ? number : first_of_kernel)) before.bytes = 0;
    if (!(before.bytes & now.bytes)) {
      if (!before.bytes) place = &before;
      continue;
    }
    const bool ordered = before.block == number && (before.thread == now.thread || before.clock <= clocks[before.thread]);
    if (!ordered && (before.writes || now.writes) && !(before.atomic && now.atomic)) report(now, before, is_shared, at);
    // What would race with the earlier access races with this one too.
    if (ordered && (now.writes || !before.writes) && !(before.bytes & ~now.bytes) && (before.atomic || !now.atomic)) {
      before.bytes = 0;
      place = &before;
    }
  }
  static unsigned turn = 0;
  *(place ? place : &word[turn++ % word.size()]) = now;
}

void note(const Thread& self, const void* address, size_t size, bool writes, const void* code, bool atomic = false) {
  auto at = reinterpret_cast<uintptr_t>(address);
  const auto stack = reinterpret_cast<uintptr_t>(self.stack.get());
  if (at - stack < kStackBytes) return;  // a thread's own variables
  static const Range variables = own_variables();
  const bool is_shared = variables.holds(at);
  const auto thread = static_cast<uint16_t>(&self - block->threads.data());
  for (const uintptr_t end = at + size; at < end;) {
    const uintptr_t next = std::min(at / 8 * 8 + 8, end);
    const auto bytes = static_cast<uint8_t>(((1u << (next - at)) - 1) << at % 8);
    note_word(word_at(at), {number, self.clocks[thread], thread, bytes, writes, atomic, code}, is_shared, at);
    at = next;
  }
}

void note_own(const void* address, size_t size, bool writes, const void* code, bool atomic = false) {
  if (block && block->now && block->now->watched) note(*block->now, address, size, writes, code, atomic);
}

}  // namespace

void begin_kernel() { first_of_kernel = number + 1; }
void begin_block_races(size_t threads) {
  ++number;
  for (size_t i = 0; i < threads; ++i) {
    block->threads[i].clocks.assign(threads, 0);
    block->threads[i].clocks[i] = 1;
  }
}
void acquire(const Clocks& from) {
  Clocks& own = block->now->clocks;
  for (size_t i = 0; i < from.size(); ++i) own[i] = std::max(own[i], from[i]);
}
void release(Clocks& into) {
  Clocks& own = block->now->clocks;
  into.resize(own.size());
  for (size_t i = 0; i < own.size(); ++i) into[i] = std::max(into[i], own[i]);
  ++own[static_cast<size_t>(block->now - block->threads.data())];
}
void note_copy(const Copy& copy, bool starts) {
  if (copy.from && starts) note(*block->now, copy.from, 16, false, copy.code);
  note(*block->now, copy.to, 16, true, copy.code);
}

}  // namespace emulation

// What the compiler calls ("tsan_interface.h" of compiler-rt).
#define QEXPORT_ACCESS(name, size, writes, atomic)                                                  \
  extern "C" __attribute__((visibility("default"))) void __tsan_##name##size(const void* address) { \
    emulation::note_own(address, size, writes, __builtin_return_address(0), atomic);                \
  }
#define QEXPORT_ACCESSES(size)                       \
  QEXPORT_ACCESS(read, size, false, false)           \
  QEXPORT_ACCESS(write, size, true, false)           \
  QEXPORT_ACCESS(unaligned_read, size, false, false) \
  QEXPORT_ACCESS(unaligned_write, size, true, false) \
  QEXPORT_ACCESS(volatile_read, size, false, true)   \
  QEXPORT_ACCESS(volatile_write, size, true, true)
QEXPORT_ACCESSES(1)
QEXPORT_ACCESSES(2)
QEXPORT_ACCESSES(4)
QEXPORT_ACCESSES(8)
QEXPORT_ACCESSES(16)
extern "C" {
void __tsan_read_range(const void* address, size_t size) {
  emulation::note_own(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(const void* address, size_t size) {
  emulation::note_own(address, size, true, __builtin_return_address(0));
}
uint32_t __tsan_atomic32_fetch_add(uint32_t* address, uint32_t x, int) {
  emulation::note_own(address, 4, true, __builtin_return_address(0), true);
  const uint32_t old = *address;
  *address = old + x;
  return old;
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
