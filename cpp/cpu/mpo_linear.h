// MPOLinear on the CPU. From the first group on: what is done of the outputs, a bond, and what is left of the inputs,
//
//     (token, done, bond r, rest) -> (token, done c, bond', rest), the core (bond r, c bond') transposed times (bond r,
//     rest)
//
// with the rest along the lanes; the last group, where nothing is left, has its outputs there: its core is the right
// operand, in panels. One group: that is rows times a matrix. A piece of work takes some tokens through all groups.
#pragma once

#include "qexport/mpo_linear.h"
#include "train_groups.h"

namespace qexport {
namespace QEXPORT_ISA {

// The groups of a weight where mpo_linear_cpu_prepare puts them: cores, then the panels of the last one.
template <class Real>
struct WeightForm {
  int64_t inputs, outputs, width, panels;  // of the last group; width of a panel

  WeightForm(const MpsLayout& l, const MpsGroups& groups) {
    const Core<Real> last = group_shape<Real>(l, groups, groups.count - 1);
    const bool whole = groups.count == 1;  // the matrix needs no padding
    inputs = whole ? l.rows : last.left * last.r;
    outputs = whole ? l.cols : last.c;
    width = outputs <= Wide<Real>::lanes ? Wide<Real>::lanes : Wide<Real>::panel;
    panels = (outputs + width - 1) / width;
  }

  Real* take_panels(Arena& arena) const { return arena.take<Real>(panels * inputs * width); }
};

template <class Real>
static size_t prepare_weight(const MpoLinearParams& p, const void* cores, Real* weights, char* scratch,
                             const ParallelFor& parallel) {
  const MpsLayout& l = p.layout;
  const WeightForm<Real> form(l, p.groups);
  Arena arena{scratch, 0};
  GroupMaker<Real> maker(l, p.type, cores, arena);
  const Core<Real>* made = maker.make_all(p.groups, parallel);
  if (!scratch) return maker.most();
  Arena kept{reinterpret_cast<char*>(weights), 0};
  for (int64_t g = 0; g + 1 < p.groups.count; ++g) {
    std::copy_n(made[g].data, made[g].numbers(), kept.take<Real>(made[g].numbers()));
  }
  const Core<Real>& last = made[p.groups.count - 1];
  Real* panel = form.take_panels(kept);
  for (int64_t at = 0; at < form.outputs; at += form.width) {
    const int64_t count = std::min(form.width, form.outputs - at);
    for (int64_t i = 0; i < form.inputs; ++i, panel += form.width) {
      std::copy_n(last.data + i * last.c + at, count, panel);
      std::fill_n(panel + count, form.width - count, Real{0});
    }
  }
  return 0;
}

template <class Real>
static size_t weight_bytes_of(const MpoLinearParams& p) {
  Arena arena{nullptr, 0};
  for (int64_t g = 0; g + 1 < p.groups.count; ++g) arena.take<Real>(group_shape<Real>(p.layout, p.groups, g).numbers());
  WeightForm<Real>(p.layout, p.groups).take_panels(arena);
  return arena.used;
}

template <class Real>
class RowsTimesTrain {
 public:
  explicit RowsTimesTrain(const MpoLinearParams& p)
      : p_(p), l_(p.layout), groups_(p.groups.count), form_(p.layout, p.groups) {
    const bool whole = groups_ == 1;
    int64_t padded = 1;
    for (int64_t k = 0; k < l_.sites; ++k) padded *= l_.row_factors[k];
    row_ = whole ? l_.rows : padded;
    state_ = row_;
    int64_t rest = padded;
    products_ = 0;
    for (int64_t g = 0; g < groups_; ++g) {
      const Core<Real> core = group_shape<Real>(l_, p.groups, g);
      rest /= core.r;
      if (g + 1 < groups_) {
        products_ += done_ * core.numbers() * rest;
        done_ *= core.c;
        state_ = std::max(state_, done_ * core.right * rest);
      }
    }
    products_ += done_ * form_.inputs * form_.panels * form_.width;
    const int64_t fit = std::max<int64_t>(1, std::min<int64_t>(32, kStateNumbers / state_));
    tokens_ = std::max<int64_t>(1, whole ? std::min<int64_t>(64, p.tokens) : std::min(fit, (p.tokens + 7) / 8));
    panels_ = whole ? std::min<int64_t>(form_.panels, 8) : form_.panels;
    tiles_ = (p.tokens + tokens_ - 1) / tokens_;
    chunks_ = (form_.panels + panels_ - 1) / panels_;
  }

  // Without scratch: the bytes of it that this needs.
  size_t run(const MpoLinearTensors& t, char* scratch, const ParallelFor& parallel) const {
    Arena arena{scratch, 0};
    Real* bias = arena.take<Real>(t.bias || !scratch ? l_.cols : 0);
    const int64_t numbers = 2 * room() + tokens_ * done_ * form_.width;
    Real* work = arena.take<Real>(numbers * workers(parallel));
    if (!scratch) return arena.used;
    if (t.bias) read_numbers(p_.type, static_cast<const char*>(t.bias), l_.cols, bias);
    for_each_piece(tiles_ * chunks_, workers(parallel), reinterpret_cast<char*>(work),
                   static_cast<size_t>(numbers) * sizeof(Real), parallel,
                   [&](int64_t i, char* own) { piece(i, t, t.bias ? bias : nullptr, reinterpret_cast<Real*>(own)); });
    return 0;
  }

 private:
  static constexpr int64_t kStateNumbers = int64_t{1} << 15;  // of the states of a piece, so that they stay in the cache

  // Numbers of a state of a piece; whole vectors behind its end are read.
  int64_t room() const { return tokens_ * state_ + Wide<Real>::panel; }
  int workers(const ParallelFor& parallel) const {
    const int64_t pieces = tiles_ * chunks_;
    return products_ * p_.tokens < kSerialProducts ? 1 : static_cast<int>(std::min<int64_t>(parallel.max_threads, pieces));
  }

  void piece(int64_t index, const MpoLinearTensors& t, const Real* bias, Real* work) const {
    const int64_t first = index % tiles_ * tokens_, count = std::min(tokens_, p_.tokens - first);
    int64_t panel = index / tiles_ * panels_;
    const int64_t end = std::min(panel + panels_, form_.panels);
    Real *state = work, *next = work + room(), *tile = next + room();
    const char* x = static_cast<const char*>(t.x) + first * l_.rows * bytes_of(p_.type);
    const Real* from = state;
    if (groups_ == 1 && is_native<Real>(p_.type)) {
      from = reinterpret_cast<const Real*>(x);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        read_numbers(p_.type, x + i * l_.rows * bytes_of(p_.type), l_.rows, state + i * row_);
        std::fill_n(state + i * row_ + l_.rows, row_ - l_.rows, Real{0});
      }
    }
    Arena weights{static_cast<char*>(const_cast<void*>(t.weights)), 0};
    int64_t done = 1, rest = row_;
    for (int64_t g = 0; g + 1 < groups_; ++g) {
      const Core<Real> core = group_shape<Real>(l_, p_.groups, g);
      const Real* numbers = weights.take<Real>(core.numbers());
      const int64_t n = core.left * core.r, rows = core.c * core.right;
      rest /= core.r;
      for (int64_t o = 0; o < count * done; ++o) {
        multiply(numbers, int64_t{1}, rows, from + o * n * rest, rest, next + o * rows * rest, rest, n, rows, rest);
      }
      done *= core.c;
      std::swap(state, next);
      from = state;
    }
    const Real* panels = form_.take_panels(weights);
    for (; panel < end; ++panel) {
      const int64_t at = panel * form_.width;
      if (is_native<Real>(p_.type) && !bias && l_.cols == done * form_.outputs && at + form_.width <= form_.outputs) {
        multiply(from, form_.inputs, int64_t{1}, panels + at * form_.inputs, form_.width,
                 static_cast<Real*>(t.y) + first * l_.cols + at, form_.outputs, form_.inputs, count * done, form_.width);
        continue;
      }
      multiply(from, form_.inputs, int64_t{1}, panels + at * form_.inputs, form_.width, tile, form_.width, form_.inputs,
               count * done, form_.width);
      for (int64_t i = 0; i < count * done; ++i) {
        const int64_t column = i % done * form_.outputs + at;
        const int64_t kept = std::min({form_.width, form_.outputs - at, l_.cols - column});
        Real* numbers = tile + i * form_.width;
        for (int64_t j = 0; bias && j < kept; ++j) numbers[j] += bias[column + j];
        if (kept <= 0) continue;
        write_numbers(p_.type, numbers, kept,
                      static_cast<char*>(t.y) + ((first + i / done) * l_.cols + column) * bytes_of(p_.type));
      }
    }
  }

  const MpoLinearParams& p_;
  const MpsLayout& l_;
  int64_t groups_;
  WeightForm<Real> form_;
  int64_t row_;                       // numbers of a row of x, with its padding
  int64_t done_ = 1;                  // rows of a token before the last group
  int64_t state_ = 0, products_ = 0;  // of a token
  int64_t tokens_, panels_;           // of a piece
  int64_t tiles_, chunks_;            // pieces by tokens, by panels
};

}  // namespace QEXPORT_ISA
}  // namespace qexport
