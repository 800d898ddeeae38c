// Compiled once per instruction set, as row_kernels.cc; one matrix of a batch per thread, or all threads on one.
#include "mps_encode.h"

namespace qexport {
namespace QEXPORT_ISA {
namespace {

// body(matrix, parallel) for each matrix of a batch, with the parallel-for that is left for its inside.
template <class Body>
MpsStatus for_each_matrix(int64_t batch, const ParallelFor& parallel, const Body& body) {
  constexpr int64_t kinds = MpsStatus::no_memory;
  const ParallelFor inner = batch > 1 ? alone() : parallel;
  std::atomic<int64_t> first_bad{kinds * batch};  // kinds x matrix + kind
  std::atomic<bool> no_memory{false};
  for_each_piece(batch, parallel.max_threads, nullptr, 0, parallel, [&](int64_t matrix, char*) {
    try {
      const MpsStatus::Kind kind = body(matrix, inner);
      if (kind == MpsStatus::done) return;
      const int64_t bad = kinds * matrix + kind;
      int64_t first = first_bad.load();
      while (bad < first && !first_bad.compare_exchange_weak(first, bad)) {
      }
    } catch (...) {
      no_memory.store(true);
    }
  });
  if (no_memory.load()) return {MpsStatus::no_memory, 0};
  const int64_t bad = first_bad.load();
  if (bad < kinds * batch) return {static_cast<MpsStatus::Kind>(bad % kinds), bad / kinds};
  return {MpsStatus::done, 0};
}

int64_t numbers(const MpsLayout& l) {
  int64_t sum = 0;
  for (int64_t k = 0; k < l.sites; ++k) sum += l.bonds[k] * l.row_factors[k] * l.col_factors[k] * l.bonds[k + 1];
  return sum;
}

template <class T>
MpsStatus encode_as(const MpsEncodeParams& p, const MpsEncodeTensors& t, const ParallelFor& parallel) {
  const MpsLayout& l = p.layout;
  return for_each_matrix(p.batch, parallel, [&](int64_t m, const ParallelFor& inner) {
    Encoder<T> encoder(p, static_cast<const T*>(t.matrix) + m * l.rows * l.cols, static_cast<T*>(t.cores) + m * numbers(l),
                       t.ranks + m * (l.sites + 1), inner);
    return encoder.run(t.error + m, t.lower_bound + m);
  });
}

MpsStatus encode(const MpsEncodeParams& p, const MpsEncodeTensors& t, const ParallelFor& parallel) {
  return p.type == DType::f64 ? encode_as<double>(p, t, parallel) : encode_as<float>(p, t, parallel);
}

}  // namespace

extern const MpsKernels mps_kernels;
const MpsKernels mps_kernels = {encode};

}  // namespace QEXPORT_ISA
}  // namespace qexport
