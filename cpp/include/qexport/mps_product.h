// Products with a train of cores, what MPSAttention and MPOLinear share: docs/mps.md. Plain pointers and sizes; knows no
// framework, allocates nothing.
//
// Consecutive sites are merged into groups, each a core like those of the sites; all sites in one group are the matrix.
#pragma once

#include <cstddef>
#include <initializer_list>

#include "qexport/mps.h"

namespace qexport {

// Group g holds the sites [ends[g - 1], ends[g]), the first one from 0 on.
struct MpsGroups {
  int64_t count;
  const int64_t* ends;  // (count,), the last one is the number of sites
};

// Where the sites [begin, end) are cut into two halves, which are merged first: larger(k), the numbers of the larger half
// for a cut before site k, becomes no smaller by moving the cut by one site.
template <class Larger>
static inline int64_t split_sites(int64_t begin, int64_t end, const Larger& larger) {
  int64_t middle = (begin + end) / 2;
  auto least = larger(middle);
  for (const int64_t step : {int64_t{-1}, int64_t{1}}) {
    while (middle + step > begin && middle + step < end) {
      const auto next = larger(middle + step);
      if (!(next < least)) break;
      middle += step, least = next;
    }
  }
  return middle;
}

}  // namespace qexport
