// MPSEncode on the CPU, one matrix at a time. A cut needs the left singular vectors of (bond r c) x (rest): the
// eigenvectors of its Gram matrix in float64, in which singular values down to 1e-8 of the largest can be told, an ulp of
// float32 being 6e-8. The unfolded matrix is made in pieces of a few hundred columns, twice: for the Gram matrix and for the
// product with the vectors. Nothing here takes scratch from the caller: how much there is depends on ranks that only the
// numbers tell, and Eigen's decompositions allocate what they need whatever they are given.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "eigen.h"
#include "mps.h"
#include "workers.h"

namespace qexport {
namespace QEXPORT_ISA {

using Columns = Eigen::MatrixXd;  // column-major
using Rows = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr double kNoise = 1.0 / (1ll << 48);                // share of the largest eigenvalue, square of an ulp of float32
constexpr double kLeastNorm2 = 1e-280, kMostNorm2 = 1e300;  // squares of what is much smaller than the norm are held, too
constexpr int64_t kPieceColumns = 512;
constexpr int64_t kMostParts = 16;
constexpr int64_t kSerialProducts = int64_t{1} << 20;  // multiply-adds below which waking a pool costs as much

// (left, R, C) numbers, seen as a matrix: row x of it begins at offset[x], column (i, j) lies at i * C + j, i < height,
// j < width.
template <class T>
struct Unfolding {
  const T* data;
  Buffer<int64_t> offset;
  int64_t height, width, stride;

  int64_t rows() const { return offset.size(); }
  int64_t cols() const { return height * width; }
  int64_t lines() const { return std::max<int64_t>(1, kPieceColumns / width); }  // of a piece
  int64_t pieces() const { return (height + lines() - 1) / lines(); }

  // Columns of piece p, and where they begin in the whole.
  Rows piece(int64_t p) const {
    const int64_t first = p * lines(), count = std::min(lines(), height - first);
    Rows result(rows(), count * width);
    for (int64_t x = 0; x < rows(); ++x) {
      for (int64_t i = 0; i < count; ++i) {
        const T* from = data + offset[x] + (first + i) * stride;
        double* to = &result(x, i * width);
        for (int64_t j = 0; j < width; ++j) to[j] = static_cast<double>(from[j]);
      }
    }
    return result;
  }
};

// What is left of the padded matrix behind the last cut: (left, R, C) numbers.
struct Remainder {
  Rows numbers;
  int64_t left, R, C;
};

template <class T>
class Encoder {
 public:
  Encoder(const MpsEncodeParams& p, const T* matrix, T* cores, int64_t* ranks, const ParallelFor& parallel)
      : p_(p), l_(p.layout), core_(cores), ranks_(ranks), parallel_(parallel), matrix_(matrix) {
    R_ = C_ = 1;
    for (int64_t k = 0; k < l_.sites; ++k) R_ *= l_.row_factors[k], C_ *= l_.col_factors[k];
    if (R_ != l_.rows || C_ != l_.cols) pad();
  }

  MpsStatus::Kind run(double* error, double* lower_bound) {
    double spent = 0.0, worst = 0.0;
    int64_t complete = 1, left = 1;
    int64_t group = 0;  // the first site that waits, since its bond is complete
    ranks_[0] = 1;
    for (int64_t k = 0; k < l_.sites; ++k) {
      const int64_t d = l_.row_factors[k] * l_.col_factors[k], cap = l_.bonds[k + 1];
      complete *= d;
      const int64_t rows = left * d, cols = behind(k);
      const bool whole = p_.tol == 0.0 && cap >= std::min(complete, cols),
                 keep = k + 1 == l_.sites || (whole && cols < rows);
      if (!keep && whole && rows == complete) {
        write_identity(k, left, rows);
        left = rows;
        continue;
      }
      const MpsStatus::Kind kind = started_ ? site(unfold(rest_.numbers.data(), group, k), k, left, keep, &spent, &worst)
                                            : site(unfold(matrix_, group, k), k, left, keep, &spent, &worst);
      if (kind != MpsStatus::done) return kind;
      left = rest_.left;
      group = k + 1;
    }
    const double scale = norm2_ > 0.0 ? norm2_ : 1.0;
    *error = std::sqrt(spent / scale);
    *lower_bound = std::sqrt(worst / scale);
    return MpsStatus::done;
  }

 private:
  void pad() {
    padded_ = Buffer<T>::Zero(R_ * C_);
    for (int64_t i = 0; i < l_.rows; ++i) {
      std::copy_n(matrix_ + i * l_.cols, l_.cols, padded_.data() + i * C_);
    }
    matrix_ = padded_.data();
  }

  int64_t behind(int64_t k) const {
    int64_t places = 1;
    for (++k; k < l_.sites; ++k) places *= l_.row_factors[k] * l_.col_factors[k];
    return places;
  }

  template <class S>
  Unfolding<S> unfold(const S* data, int64_t first, int64_t last) const {
    const int64_t left = started_ ? rest_.left : 1, C = started_ ? rest_.C : C_;
    int64_t height = started_ ? rest_.R : R_, width = C;
    Unfolding<S> u{data, Buffer<int64_t>(left), 0, 0, C};
    for (int64_t a = 0; a < left; ++a) u.offset[a] = a * height * C;
    for (int64_t k = first; k <= last; ++k) {
      const int64_t r = l_.row_factors[k], c = l_.col_factors[k];
      height /= r, width /= c;
      Buffer<int64_t> finer(u.offset.size() * r * c);
      for (int64_t x = 0; x < finer.size(); ++x) {
        finer[x] = u.offset[x / (r * c)] + x / c % r * height * C + x % c * width;
      }
      u.offset.swap(finer);
    }
    u.height = height, u.width = width;
    return u;
  }

  // Site k from an unfolded matrix: its core, and what is left. `keep`: the matrix itself is the core.
  template <class S>
  MpsStatus::Kind site(const Unfolding<S>& u, int64_t k, int64_t left, bool keep, double* spent, double* worst) {
    const int64_t rows = u.rows(), cols = u.cols();
    Remainder next{{}, 0, u.height, u.width};
    if (keep) {
      Rows numbers(rows, cols);
      for (int64_t q = 0, at = 0; q < u.pieces(); ++q) {
        const Rows piece = u.piece(q);
        numbers.middleCols(at, piece.cols()) = piece;
        at += piece.cols();
      }
      if (!started_) norm2_ = numbers.squaredNorm();
      if (const auto kind = kind_of_norm(); kind != MpsStatus::done) return kind;
      write(k, left, numbers);
      next.numbers = Rows::Identity(cols, cols);
      next.left = cols;
    } else {
      Columns small, orthonormal;  // a symmetric matrix of the squares of the singular values
      if (rows <= cols) {
        small = gram(u);
      } else {
        Columns tall(rows, cols);
        for (int64_t q = 0, at = 0; q < u.pieces(); ++q) {
          const Rows piece = u.piece(q);
          tall.middleCols(at, piece.cols()) = piece;
          at += piece.cols();
        }
        const Eigen::HouseholderQR<Columns> qr(tall);
        const Columns triangle = qr.matrixQR().topRows(cols).template triangularView<Eigen::Upper>();
        small = triangle * triangle.transpose();
        orthonormal = qr.householderQ() * Columns::Identity(rows, cols);
      }
      if (!started_) norm2_ = small.trace();
      if (const auto kind = kind_of_norm(); kind != MpsStatus::done) return kind;
      const Eigen::SelfAdjointEigenSolver<Columns> solver(small);  // smallest eigenvalue first
      if (solver.info() != Eigen::Success) return MpsStatus::no_convergence;
      const int64_t n = small.rows();
      const auto value = [&](int64_t i) { return std::max(0.0, solver.eigenvalues()(i)); };
      const double cuts = static_cast<double>(l_.sites - 1 - k);
      const double allowed = std::max(0.0, p_.tol * p_.tol * norm2_ - *spent) / cuts;
      double lost = 0.0;
      int64_t dropped = 0;
      while (dropped + 1 < n) {
        const double more = lost + value(dropped);
        const bool must = n - dropped > l_.bonds[k + 1] || value(dropped) <= kNoise * value(n - 1);
        if (!must && more > allowed) break;
        lost = more;
        ++dropped;
      }
      *spent += lost;
      *worst = std::max(*worst, lost);
      const int64_t kept = n - dropped;
      Columns vectors = solver.eigenvectors().rightCols(kept).rowwise().reverse();
      if (rows > cols) vectors = orthonormal * vectors;
      write(k, left, vectors);
      next.numbers = project(u, vectors);
      next.left = kept;
    }
    started_ = true;
    rest_ = std::move(next);
    return MpsStatus::done;
  }

  // `done` where norm2_ is that of the matrix: no square has overflown, nor has what counts been rounded to zero.
  MpsStatus::Kind kind_of_norm() const {
    if (norm2_ >= kLeastNorm2 && norm2_ <= kMostNorm2) return MpsStatus::done;
    bool zero = true;
    for (int64_t i = 0; i < R_ * C_; ++i) {
      if (!std::isfinite(matrix_[i])) return MpsStatus::not_finite;
      zero = zero && matrix_[i] == T{0};
    }
    return zero ? MpsStatus::done : MpsStatus::out_of_range;
  }

  // Pieces in at most kMostParts parts, always the same, whatever the number of threads.
  template <class S, class Body>
  void for_parts(const Unfolding<S>& u, int64_t parts, int64_t products, const Body& body) const {
    const int64_t per_part = (u.pieces() + parts - 1) / parts;
    for_each_piece(parts, products < kSerialProducts ? 1 : parallel_.max_threads, nullptr, 0, parallel_,
                   [&](int64_t part, char*) {
                     try {
                       body(part, part * per_part, std::min(u.pieces(), (part + 1) * per_part));
                     } catch (...) {  // no exception may leave a pool's thread
                       failed_.store(true);
                     }
                   });
    if (failed_.load()) throw std::bad_alloc();
  }

  template <class S>
  Columns gram(const Unfolding<S>& u) const {
    const int64_t rows = u.rows(), parts = std::min(kMostParts, u.pieces());
    std::vector<Columns> sums(static_cast<size_t>(parts));
    for_parts(u, parts, rows * rows * u.cols(), [&](int64_t part, int64_t begin, int64_t end) {
      Columns sum = Columns::Zero(rows, rows);
      for (int64_t q = begin; q < end; ++q) sum.template selfadjointView<Eigen::Lower>().rankUpdate(u.piece(q));
      sums[static_cast<size_t>(part)] = std::move(sum);
    });
    for (size_t part = 1; part < sums.size(); ++part) sums[0] += sums[part];
    return sums[0].template selfadjointView<Eigen::Lower>();
  }

  template <class S>
  Rows project(const Unfolding<S>& u, const Columns& vectors) const {
    Rows result(vectors.cols(), u.cols());
    for_parts(u, u.pieces(), u.rows() * vectors.cols() * u.cols(), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        const Rows piece = u.piece(q);
        result.middleCols(q * u.lines() * u.width, piece.cols()).noalias() = vectors.transpose() * piece;
      }
    });
    return result;
  }

  // Core k: element (a, i, j, b) is numbers(a r c + i c + j, b), zeros beyond.
  template <class M>
  void write(int64_t k, int64_t left, const M& numbers) {
    const int64_t d = l_.row_factors[k] * l_.col_factors[k], right = l_.bonds[k + 1];
    std::fill_n(core_, l_.bonds[k] * d * right, T{0});
    for (int64_t x = 0; x < left * d; ++x) {
      for (int64_t b = 0; b < numbers.cols(); ++b) core_[x * right + b] = static_cast<T>(numbers(x, b));
    }
    core_ += l_.bonds[k] * d * right;
    ranks_[k + 1] = numbers.cols();
  }

  void write_identity(int64_t k, int64_t left, int64_t rows) {
    const int64_t d = l_.row_factors[k] * l_.col_factors[k], right = l_.bonds[k + 1];
    std::fill_n(core_, l_.bonds[k] * d * right, T{0});
    for (int64_t x = 0; x < left * d; ++x) core_[x * right + x] = T{1};
    core_ += l_.bonds[k] * d * right;
    ranks_[k + 1] = rows;
  }

  const MpsEncodeParams& p_;
  const MpsLayout& l_;
  T* core_;
  int64_t* ranks_;
  const ParallelFor& parallel_;
  const T* matrix_;
  Buffer<T> padded_;
  int64_t R_, C_;
  double norm2_ = 0.0;
  bool started_ = false;
  Remainder rest_{};
  mutable std::atomic<bool> failed_{false};
};

}  // namespace QEXPORT_ISA
}  // namespace qexport
