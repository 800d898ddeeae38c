// MPSAttention on the CPU. From the last group on, with features along the lanes, the state is what is left of the columns,
// a bond, and the row indices that are done:
//
//     (C c, bond, done, features) -> (C, bond', r done, features), for each C a product with the core, (bond' r, c bond)
//
// which sorts no digit in memory. Row indices that are done meet no longer: a piece of work takes some of the last group,
// and some features, through all groups, so that its states stay in the cache.
#pragma once

#include "qexport/mps_attention.h"
#include "train_groups.h"

namespace qexport {
namespace QEXPORT_ISA {

template <class Real>
class TrainTimesValues {
 public:
  static constexpr int64_t kPieceRows = 8;  // bonds or row indices that a product with the last core has at least

  explicit TrainTimesValues(const MpsAttentionParams& p) : p_(p), l_(p.layout), groups_(p.groups.count) {
    for (int64_t k = 0; k < l_.sites; ++k) padded_cols_ *= l_.col_factors[k];
    ld_ = (p.features + Wide<Real>::lanes - 1) / Wide<Real>::lanes * Wide<Real>::lanes;
    const Core<Real> last = group_shape<Real>(l_, p.groups, groups_ - 1);
    const bool whole = groups_ == 1;
    rows_ = std::min<int64_t>(last.r, whole ? 64 : last.left < kPieceRows ? kPieceRows : 1);
    width_ = std::min<int64_t>(ld_, whole ? 256 : Wide<Real>::panel);
    chunks_ = (last.r + rows_ - 1) / rows_;
    tiles_ = ld_ == 0 ? 0 : (ld_ + width_ - 1) / width_;  // values may have no features
    int64_t C = padded_cols_, done = rows_;
    for (int64_t g = groups_; g-- > 0;) {
      const Core<Real> core = group_shape<Real>(l_, p.groups, g);
      C /= core.c;
      if (g + 1 < groups_) done *= core.r;
      const int64_t numbers = C * core.left * done * width_;
      state_ = std::max(state_, numbers);
      products_ += numbers * core.c * core.right;
    }
  }

  // Y of one train. Without scratch: the bytes of it that this needs.
  size_t run(const void* cores, const char* V, char* Y, char* scratch, const ParallelFor& parallel) const {
    Arena arena{scratch, 0};
    const int64_t rows = p_.items * l_.cols;
    const bool copied = !is_native<Real>(p_.type) || ld_ != p_.features;
    Real* values = copied ? arena.take<Real>(rows * ld_) : nullptr;
    GroupMaker<Real> maker(l_, p_.type, cores, arena);
    const Core<Real>* made = maker.make_all(p_.groups, parallel);
    Real* states = arena.take<Real>(2 * state_ * workers(parallel));
    if (!scratch) return std::max(maker.most(), arena.used);
    if (copied) {
      for (int64_t i = 0; i < rows; ++i) {
        std::fill_n(values + i * ld_, ld_, Real{0});
        read_numbers(p_.type, V + i * p_.features * bytes_of(p_.type), p_.features, values + i * ld_);
      }
    }
    const Real* from = copied ? values : reinterpret_cast<const Real*>(V);
    for_each_piece(pieces(), workers(parallel), reinterpret_cast<char*>(states),
                   static_cast<size_t>(2 * state_) * sizeof(Real), parallel,
                   [&](int64_t i, char* work) { piece(i, made, from, Y, reinterpret_cast<Real*>(work)); });
    return 0;
  }

 private:
  int64_t pieces() const { return p_.items * chunks_ * tiles_; }
  int workers(const ParallelFor& parallel) const {
    return products_ * pieces() < kSerialProducts ? 1 : static_cast<int>(std::min<int64_t>(parallel.max_threads, pieces()));
  }

  void piece(int64_t index, const Core<Real>* cores, const Real* V, char* Y, Real* work) const {
    const int64_t item = index / (chunks_ * tiles_), first = index / tiles_ % chunks_ * rows_, at = index % tiles_ * width_;
    const int64_t width = std::min(width_, ld_ - at);
    const Core<Real>& last = cores[groups_ - 1];
    const int64_t count = std::min(rows_, last.r - first);
    Real *state = work, *next = work + state_;
    int64_t C = padded_cols_ / last.c, done = count;
    for (int64_t x = 0; x < C; ++x) {
      const int64_t valid = std::max<int64_t>(0, std::min(last.c, l_.cols - x * last.c));
      const Real* from = V + (item * l_.cols + x * last.c) * ld_ + at;
      const Real* core = last.data + first * last.c;
      Real* to = state + x * last.left * count * width;
      if (last.left == 1 || count == last.r) {
        multiply(core, last.c, int64_t{1}, from, ld_, to, width, valid, last.left * count, width);
        continue;
      }
      const bool by_bond = count >= last.left;  // the longer of both is a product's rows
      for (int64_t i = 0; i < (by_bond ? last.left : count); ++i) {
        if (by_bond) {
          multiply(core + i * last.r * last.c, last.c, int64_t{1}, from, ld_, to + i * count * width, width, valid, count,
                   width);
        } else {
          multiply(core + i * last.c, last.r * last.c, int64_t{1}, from, ld_, to + i * width, count * width, valid,
                   last.left, width);
        }
      }
    }
    for (int64_t g = groups_ - 1; g-- > 0;) {
      const Core<Real>& core = cores[g];
      const int64_t n = core.c * core.right, rows = core.left * core.r, columns = done * width;
      C /= core.c;
      for (int64_t x = 0; x < C; ++x) {
        multiply(core.data, n, int64_t{1}, state + x * n * columns, columns, next + x * rows * columns, columns, n, rows,
                 columns);
      }
      done *= core.r;
      std::swap(state, next);
    }
    const int64_t kept = std::min(width, p_.features - at);
    for (int64_t i = 0; i < done; ++i, state += width) {
      const int64_t row = i / count * last.r + first + i % count;
      if (row >= l_.rows) return;
      write_numbers(p_.type, state, kept, Y + ((item * l_.rows + row) * p_.features + at) * bytes_of(p_.type));
    }
  }

  const MpsAttentionParams& p_;
  const MpsLayout& l_;
  int64_t groups_, padded_cols_ = 1;
  int64_t ld_;                        // features, filled up to whole vectors
  int64_t rows_, width_;              // row indices of the last group, and features, of a piece
  int64_t chunks_, tiles_;            // pieces of an item
  int64_t state_ = 0, products_ = 0;  // of a piece
};

}  // namespace QEXPORT_ISA
}  // namespace qexport
