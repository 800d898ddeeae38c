// Which code a card runs, of what was compiled for several.
#include <cstdio>

#include "common.cuh"

int main() {
  struct Case {
    int capability, expected;
    std::initializer_list<int> compiled;
  };
  const auto all = {750, 800, 900, 1200};
  // What is for sm_90a is for nothing newer, and where it is missing no tile is chosen that needs it.
  const Case cases[] = {{70, 0, all},   {75, 75, all},   {89, 80, all},   {90, 90, all},  {90, 80, {750, 800}},
                        {100, 80, all}, {120, 120, all}, {121, 120, all}, {86, 75, {750}}};
  int wrong = 0;
  for (const Case& one : cases) {
    const int found = qexport::cuda::code_for(one.capability, one.compiled);
    if (found == one.expected) continue;
    std::printf("sm_%d: code for %d, not %d\n", one.capability, found, one.expected), ++wrong;
  }
  return wrong > 0;
}
