// Picks the instruction set once, at the first call.
#include <cstdlib>
#include <iterator>
#include <string>

#include "kernels.h"
#include "tile_permission.h"

namespace qexport {
namespace {

// One copy of the kernels that this build holds, whether this processor runs it, and whether it is faster there than those
// before it.
struct Copy {
  const Kernels* kernels;
  bool (*runs)();
  bool (*pays)();
};

bool always() { return true; }

#if defined(QEXPORT_HAVE_X86)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool runs_avx512bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

// Intel's processors multiply vectors of bfloat16 at half the speed of float32 (measured on a Xeon, family 6, model 207).
bool pays_avx512bf16() { return !__builtin_cpu_is("intel"); }

bool runs_amx() {
  return runs_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && ask_for_tiles();
}
#endif

// From the least to the best.
const Copy kCopies[] = {
#if defined(QEXPORT_HAVE_NEON)
    {&neon::kernels, always, always},
#else
    {&generic::kernels, always, always},
#endif
#if defined(QEXPORT_HAVE_X86)
    {&avx2::kernels, runs_avx2, always},
    {&avx512::kernels, runs_avx512, always},
    {&avx512bf16::kernels, runs_avx512bf16, pays_avx512bf16},
    {&amx::kernels, runs_amx, always},
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
  // From the best on, and no further than needed: asking for the tiles changes the process.
  const Kernels* best = nullptr;
  for (const Copy* copy = std::end(kCopies); !best && copy-- != std::begin(kCopies);) {
    const bool candidate = wanted.empty() ? copy->pays() : wanted == copy->kernels->name;
    if (candidate && copy->runs()) best = copy->kernels;
  }
  if (best) return {best, ""};
  bool known = false;
  std::string names, usable;
  for (const Copy& copy : kCopies) {
    const std::string name = copy.kernels->name;
    known = known || wanted == name;
    names += (names.empty() ? "" : ", ") + name;
    if (copy.runs()) usable += (usable.empty() ? "" : ", ") + name;
  }
  const Kernels* least = kCopies[0].kernels;  // runs everywhere
  if (!known) return {least, "QEXPORT_ISA must be one of " + names + ", got " + wanted};
  return {least, "QEXPORT_ISA is " + wanted + ", which this processor does not have; unset it or choose one of " + usable};
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
