// How a product with a train is computed: which sites are merged. What qexport/mps/cost.py estimates, number by number.
#pragma once

#include <vector>

#include "qexport/mps_product.h"

namespace qexport {

enum class MpsMethod { automatic, factored, dense };

struct MpsPlan {
  std::vector<int64_t> ends;  // of the groups
  double nanoseconds;         // on one thread
};

// MPSAttention: the least estimated time for `items` matrices of values with `features` columns, merging included.
MpsPlan plan_attention(const MpsLayout& layout, int64_t items, int64_t features, MpsMethod method);

// MPOLinear: likewise for `tokens` rows. `constant`: merged cores are kept from run to run and cost nothing.
MpsPlan plan_linear(const MpsLayout& layout, int64_t tokens, bool constant, MpsMethod method);

}  // namespace qexport
