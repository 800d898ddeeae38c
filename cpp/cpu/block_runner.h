// Blocks of query rows for any number of threads.
#pragma once

#include <algorithm>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "workers.h"

namespace qexport {

// Results below 2^-126 are 0 while it lives. Where scores lie far apart many probabilities are, and Intel's processors take
// 100 ns for a vector that has one: exact attention took 75 times as long.
class FlushToZero {
 public:
#if defined(__SSE2__)
  FlushToZero() : control_(_mm_getcsr()) { _mm_setcsr(control_ | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(control_); }

 private:
  unsigned control_;
#else
  FlushToZero() {}
#endif
};

// Runs body(block, scratch) over every block of at most `max_rows` query rows.
class BlockRunner {
 public:
  BlockRunner(const AttentionJob& job, char* scratch, size_t per_worker, const ParallelFor& parallel)
      : job_(job), scratch_(scratch), per_worker_(per_worker), parallel_(parallel) {}

  template <class Body>
  void blocks(int64_t max_rows, const Body& body) {
    blocks(max_rows, 0, job_.params.batch * job_.params.kv_heads, body);
  }

  // Into how many blocks of at most `max_rows` rows a call is cut.
  static int64_t count(const AttentionJob& job, int64_t max_rows) {
    const Cut c = cut(job, max_rows);
    return job.params.batch * job.params.kv_heads * c.spans * c.per_span;
  }

  // The same for `heads` (batch, kv head) from first_head on.
  template <class Body>
  void blocks(int64_t max_rows, int64_t first_head, int64_t heads, const Body& body) {
    const QuantumAttentionParams& p = job_.params;
    const auto [span, spans, per_span] = cut(job_, max_rows);
    each(heads * spans * per_span, [&, spans = spans, per_span = per_span, span = span](int64_t i, char* scratch) {
      // Blocks of one head follow each other, so that its keys stay in the cache; later rows come first, since under a
      // causal mask they take longest and a long block at the end would be waited for.
      const int64_t part = per_span - 1 - i % per_span;
      const int64_t place = i / per_span;
      const int64_t first = place % spans * span + part * max_rows, head = first_head + place / spans;
      body(RowBlock{head / p.kv_heads, head % p.kv_heads, first, std::min(max_rows, place % spans * span + span - first), 0,
                    job_.total_len, i},
           scratch);
    });
  }

  // body(i, scratch) for i in [0, total).
  template <class Body>
  void each(int64_t total, const Body& body) {
    for_each_piece(total, serial_ ? 1 : parallel_.max_threads, scratch_, per_worker_, parallel_,
                   [&](int64_t i, char* scratch) {
                     const FlushToZero flush;
                     body(i, scratch);
                   });
  }

  // Waking a thread pool costs tens of microseconds: small calls stay on the calling thread.
  void set_serial(bool serial) { serial_ = serial; }

 private:
  // A kv head has `spans` spans of `span` rows, a span `per_span` blocks.
  struct Cut {
    int64_t span, spans, per_span;
  };

  static Cut cut(const AttentionJob& job, int64_t max_rows) {
    const int64_t q_len = job.params.q_len;
    // The query heads of a kv head are stacked where one head alone would leave lanes empty, as in decoding.
    const int64_t span = q_len * 2 >= max_rows ? q_len : q_len * job.group;
    return {span, q_len * job.group / std::max<int64_t>(span, 1), (span + max_rows - 1) / max_rows};
  }

  const AttentionJob& job_;
  char* scratch_;
  size_t per_worker_;
  const ParallelFor& parallel_;
  bool serial_ = false;
};

}  // namespace qexport
