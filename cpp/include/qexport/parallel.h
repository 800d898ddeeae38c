// A handle on whatever thread pool the caller has: onnxruntime's intra-op pool, std::thread, or none.
#pragma once

#include <cstddef>

namespace qexport {

struct ParallelFor {
  // Calls body(data, i) for each i in [0, total), on any threads, and returns when all are done. body never throws.
  void (*run)(void* pool, void (*body)(void* data, size_t i), size_t total, void* data);
  void* pool;
  // Upper bound of the calls that can be under way at once; scratch is laid out for as many.
  int max_threads;
};

}  // namespace qexport
