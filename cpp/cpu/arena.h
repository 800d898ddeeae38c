// Scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qexport {
namespace QEXPORT_ISA {

// Carves arrays out of scratch, each aligned to a cache line. With base null it only counts.
struct Arena {
  char* base;
  size_t used;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return base ? p : nullptr;
  }
};

}  // namespace QEXPORT_ISA
}  // namespace qexport
