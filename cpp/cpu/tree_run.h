// The phases of a call with strategy `tree`.
#pragma once

#include "block_runner.h"

namespace qexport {

// Whether the call is one for `tree`; what is not is computed exactly.
bool tree_applies(const AttentionJob& job);

// Whether a step of a few rows is to be decoded from its key_summary.
bool decode_applies(const AttentionJob& job);

// Sizes of job.tree, from job.blocks; the pointers are left null.
void layout_tree(AttentionJob& job);
size_t tree_bytes(const AttentionJob& job, int64_t heads_at_once);
void place_tree(AttentionJob& job, int64_t heads_at_once, char* memory);

void run_tree(AttentionJob& job, int64_t heads_at_once, BlockRunner& runner);

}  // namespace qexport
