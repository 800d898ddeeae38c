// Pieces of work for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "qexport/parallel.h"

namespace qexport {

// body(i, scratch) for i in [0, total), on at most `threads` threads, whose scratch is per_worker bytes each. A thread takes
// the next piece when it is done with the last one; what a piece computes must not depend on who takes it.
template <class Body>
void for_each_piece(int64_t total, int threads, char* scratch, size_t per_worker, const ParallelFor& parallel,
                    const Body& body) {
  struct Shared {
    const Body* body;
    std::atomic<int64_t> next;
    int64_t total;
    char* scratch;
    size_t per_worker;
  } shared{&body, {0}, total, scratch, per_worker};
  const auto work = [](void* data, size_t worker) {
    Shared& s = *static_cast<Shared*>(data);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.total;) {
      (*s.body)(i, s.scratch + worker * s.per_worker);
    }
  };
  const size_t workers = static_cast<size_t>(std::min<int64_t>(total, threads));
  if (workers <= 1) {
    if (total > 0) work(&shared, 0);
  } else {
    parallel.run(parallel.pool, work, workers, &shared);
  }
}

// The calling thread and no other.
static inline ParallelFor alone() {
  const auto run = [](void*, void (*body)(void*, size_t), size_t total, void* data) {
    for (size_t i = 0; i < total; ++i) body(data, i);
  };
  return {run, nullptr, 1};
}

}  // namespace qexport
