// Picks the instruction set once, at the first call.
#include <cstdlib>
#include <string>

#include "kernels.h"

namespace qexport {
namespace {

// One copy of the kernels that this build holds, and whether this processor runs it.
struct Copy {
  const Kernels* kernels;
  bool (*runs)();
};

bool runs_everywhere() { return true; }

#if defined(QEXPORT_HAVE_X86)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool runs_avx512bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

// From the least to the best.
const Copy kCopies[] = {
#if defined(QEXPORT_HAVE_NEON)
    {&neon::kernels, runs_everywhere},
#else
    {&generic::kernels, runs_everywhere},
#endif
#if defined(QEXPORT_HAVE_X86)
    {&avx2::kernels, runs_avx2},
    {&avx512::kernels, runs_avx512},
    {&avx512bf16::kernels, runs_avx512bf16},
#endif
};

struct Choice {
  const Kernels* kernels;
  std::string error;  // empty: none
};

Choice choose() {
#if defined(QEXPORT_HAVE_X86)
  __builtin_cpu_init();
#endif
  const char* variable = std::getenv("QEXPORT_ISA");
  const std::string wanted = variable ? variable : "";
  const Kernels* best = nullptr;
  const Kernels* chosen = nullptr;
  bool known = false;
  std::string names, usable;
  for (const Copy& copy : kCopies) {
    names += (names.empty() ? "" : ", ") + std::string(copy.kernels->name);
    known = known || wanted == copy.kernels->name;
    if (!copy.runs()) continue;
    usable += (usable.empty() ? "" : ", ") + std::string(copy.kernels->name);
    best = copy.kernels;
    if (wanted == copy.kernels->name) chosen = copy.kernels;
  }
  if (wanted.empty()) return {best, ""};
  if (chosen) return {chosen, ""};
  if (!known) return {best, "QEXPORT_ISA must be one of " + names + ", got " + wanted};
  return {best, "QEXPORT_ISA is " + wanted + ", which this processor does not have; unset it or choose one of " + usable};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels; }
const char* isa_name() { return choice().kernels->name; }
const char* isa_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

}  // namespace qexport
