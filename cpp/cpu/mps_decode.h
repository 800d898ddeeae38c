// MPSDecode on the CPU, one matrix at a time: the product of the first k cores is (R, C, bond), and the next core, cut by
// its row index, makes block R r + i of the next product from block R by one matrix product.
#pragma once

#include <algorithm>

#include "eigen.h"
#include "mps.h"
#include "workers.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int64_t kSerialDecode = int64_t{1} << 18;  // multiply-adds below which waking a pool costs as much

template <class T>
void decode_matrix(const MpsLayout& l, const T* cores, T* matrix, const ParallelFor& parallel) {
  using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Block = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;
  Buffer<T> state = Buffer<T>::Ones(1), next;
  int64_t R = 1, C = 1, padded_rows = 1, padded_cols = 1;
  for (int64_t k = 0; k < l.sites; ++k) padded_rows *= l.row_factors[k], padded_cols *= l.col_factors[k];
  const bool direct = padded_rows == l.rows && padded_cols == l.cols;
  for (int64_t k = 0; k < l.sites; ++k) {
    const int64_t left = l.bonds[k], r = l.row_factors[k], c = l.col_factors[k], right = l.bonds[k + 1];
    const int64_t width = C * c * right;  // of a block of the next product
    T* result = matrix;
    if (k + 1 < l.sites || !direct) {
      next.resize(R * r * width);
      result = next.data();
    }
    const T* from = state.data();
    const int64_t blocks = std::min<int64_t>(R, 64), step = (R + blocks - 1) / blocks;
    const bool serial = R * C * left * r * c * right < kSerialDecode;
    for_each_piece(
        (R + step - 1) / step, serial ? 1 : parallel.max_threads, nullptr, 0, parallel, [&](int64_t piece, char*) {
          const int64_t first = piece * step, count = std::min(step, R - first);
          if (r == 1 || (C == 1 && c == 1)) {  // the rows of a block, or the blocks, are rows of one product
            const Block in(from + first * C * left, count * C, left, Eigen::OuterStride<>(left));
            const Block core(cores, left, r * c * right, Eigen::OuterStride<>(r * c * right));
            Eigen::Map<Matrix>(result + first * r * width, count * C, r * c * right).noalias() = in.lazyProduct(core);
            return;
          }
          for (int64_t block = first; block < first + count; ++block) {
            const Block in(from + block * C * left, C, left, Eigen::OuterStride<>(left));
            for (int64_t i = 0; i < r; ++i) {
              const Block core(cores + i * c * right, left, c * right, Eigen::OuterStride<>(r * c * right));
              Eigen::Map<Matrix>(result + (block * r + i) * width, C, c * right).noalias() = in.lazyProduct(core);
            }
          }
        });
    cores += left * r * c * right;
    R *= r, C *= c;
    state.swap(next);
  }
  if (direct) return;
  for (int64_t i = 0; i < l.rows; ++i) std::copy_n(state.data() + i * padded_cols, l.cols, matrix + i * l.cols);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
