// Accesses of a kernel's threads that nothing orders. The compiler calls a function for each (-fsanitize=thread); those of
// ThreadSanitizer's library know no blocks and no shared memory, so emulation_races.cc has them. Barriers hand on what
// happened before them as vector clocks ("FastTrack", Flanagan and Freund, PLDI 2009).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

struct Copy;
using Clocks = std::vector<uint32_t>;  // by thread of a block: up to where its accesses are known to have happened

#ifdef QEXPORT_EMULATED_RACES
constexpr bool kRaces = true;
void begin_kernel();  // behind all kernels before
void begin_block_races(size_t threads);
void release(Clocks& into);  // what has happened before this thread got here
void acquire(const Clocks& from);
void note_copy(const Copy& copy, bool starts);  // reads as it starts, and writes until it ends
#else
constexpr bool kRaces = false;
inline void begin_kernel() {}
inline void begin_block_races(size_t) {}
inline void release(Clocks&) {}
inline void acquire(const Clocks&) {}
inline void note_copy(const Copy&, bool) {}
#endif

}  // namespace emulation
