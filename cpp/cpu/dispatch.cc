// Picks the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace qexport {
namespace {

struct Choice {
  const Kernels* kernels;
  const char* error;
};

bool runs_avx2() {
#if defined(QEXPORT_HAVE_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool runs_avx512() {
#if defined(QEXPORT_HAVE_X86)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Choice choose() {
#if defined(QEXPORT_HAVE_X86)
  __builtin_cpu_init();
  const Kernels* best = runs_avx512() ? &avx512::kernels : runs_avx2() ? &avx2::kernels : &generic::kernels;
#elif defined(QEXPORT_HAVE_NEON)
  const Kernels* best = &neon::kernels;
#else
  const Kernels* best = &generic::kernels;
#endif
  const char* wanted = std::getenv("QEXPORT_ISA");
  if (!wanted || !*wanted) return {best, nullptr};
  if (!std::strcmp(wanted, "generic")) return {&generic::kernels, nullptr};
#if defined(QEXPORT_HAVE_X86)
  if (!std::strcmp(wanted, "avx2")) {
    if (runs_avx2()) return {&avx2::kernels, nullptr};
    return {best, "QEXPORT_ISA is avx2, which this processor does not have; unset it or choose generic"};
  }
  if (!std::strcmp(wanted, "avx512")) {
    if (runs_avx512()) return {&avx512::kernels, nullptr};
    return {best, "QEXPORT_ISA is avx512, which this processor does not have; unset it or choose generic or avx2"};
  }
  return {best, "QEXPORT_ISA must be one of generic, avx2, avx512"};
#elif defined(QEXPORT_HAVE_NEON)
  if (!std::strcmp(wanted, "neon")) return {&neon::kernels, nullptr};
  return {best, "QEXPORT_ISA must be one of generic, neon"};
#else
  return {best, "QEXPORT_ISA must be generic"};
#endif
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels; }
const char* isa_name() { return choice().kernels->name; }
const char* isa_error() { return choice().error; }

}  // namespace qexport
