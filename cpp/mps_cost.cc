#include "qexport/mps_cost.h"

#include <algorithm>

namespace qexport {
namespace {

// Nanoseconds of one thread with AVX-512; other processors differ by about the same factor in all of them. docs/mps.md says
// how they were measured.
constexpr double kStep = 0.26;      // of a register block of two vectors, per row and multiply-add in depth
constexpr double kBlock = 5.0;      // to begin and end a register block
constexpr double kCall = 8.0;       // to begin a product
constexpr double kStored = 0.2;     // a number of a merged core
constexpr double kRead = 0.035;     // a number of a core that is too large for a core's own cache, at least
constexpr double kNear = 131072.0;  // numbers that this holds
constexpr double kStreamed = 0.25;  // a number of a core that no cache holds, once written and each time it is read
constexpr double kCached = 4194304.0;
constexpr double kPanel = 32.0;  // columns of a register block
constexpr double kLeastRows = 8.0;

double ceil_div(double a, double b) {
  const double whole = static_cast<double>(static_cast<int64_t>(a / b));
  return whole * b < a ? whole + 1.0 : whole;
}

// `count` products of (rows, depth) with (depth, columns). Blocks have 8 rows, then 4, 2, 1; the last one waits for its
// loads.
double products(double count, double rows, double depth, double columns) {
  const double eights = static_cast<double>(static_cast<int64_t>(rows / 8.0));
  const int64_t rest = static_cast<int64_t>(rows - 8.0 * eights);
  double steps = 8.0 * eights, blocks = eights;
  for (int64_t part = 4; part > 0; part /= 2) {
    if (rest & part) steps += part == 1 ? 1.5 : static_cast<double>(part), blocks += 1.0;
  }
  return count * (kCall + ceil_div(columns, kPanel) * (steps * depth * kStep + blocks * kBlock));
}

double streamed(double numbers) { return numbers > kCached ? numbers * kStreamed : 0.0; }

// The core of the sites [begin, end), and the factors of the sites around it, multiplied.
struct Group {
  int64_t begin, end;
  double left, r, c, right;
  double columns_before, rows_behind;
  double numbers() const { return left * r * c * right; }
};

class Planner {
 public:
  explicit Planner(const MpsLayout& layout) : l_(layout), rows_(1, 1.0), cols_(1, 1.0), places_(1, 1.0) {
    for (int64_t k = 0; k < l_.sites; ++k) {
      rows_.push_back(rows_.back() * static_cast<double>(l_.row_factors[k]));
      cols_.push_back(cols_.back() * static_cast<double>(l_.col_factors[k]));
      places_.push_back(rows_.back() * cols_.back());
    }
  }

  // The groups that take the least time; cost(group) is additive.
  template <class Cost>
  MpsPlan best(MpsMethod method, const Cost& cost) const {
    const int64_t sites = l_.sites;
    if (method == MpsMethod::dense || sites == 1) return {{sites}, cost(group(0, sites))};
    std::vector<double> least(static_cast<size_t>(sites + 1), 0.0);
    std::vector<int64_t> from(static_cast<size_t>(sites + 1), 0);
    for (int64_t end = 1; end <= sites; ++end) {
      bool found = false;
      for (int64_t begin = 0; begin < end; ++begin) {
        if (method == MpsMethod::factored && end - begin == sites) continue;
        const double time = least[static_cast<size_t>(begin)] + cost(group(begin, end));
        if (found && time >= least[static_cast<size_t>(end)]) continue;
        found = true;
        least[static_cast<size_t>(end)] = time;
        from[static_cast<size_t>(end)] = begin;
      }
    }
    MpsPlan plan{{}, least.back()};
    for (int64_t end = sites; end > 0; end = from[static_cast<size_t>(end)]) plan.ends.push_back(end);
    std::reverse(plan.ends.begin(), plan.ends.end());
    return plan;
  }

  double merging(const Group& g) const {
    if (g.end - g.begin == 1) return 0.0;
    const int64_t middle = split_sites(g.begin, g.end, [&](int64_t k) {
      const double before = places_[at(k)] / places_[at(g.begin)] * g.left;
      return std::max(before, places_[at(g.end)] / places_[at(k)] * g.right) * static_cast<double>(l_.bonds[k]);
    });
    const double c = cols_[at(middle)] / cols_[at(g.begin)];
    return products(g.left * g.r, c, static_cast<double>(l_.bonds[middle]), g.c / c * g.right) + g.numbers() * kStored +
           streamed(g.numbers());
  }

 private:
  static size_t at(int64_t k) { return static_cast<size_t>(k); }

  Group group(int64_t begin, int64_t end) const {
    return {begin,
            end,
            static_cast<double>(l_.bonds[begin]),
            rows_[at(end)] / rows_[at(begin)],
            cols_[at(end)] / cols_[at(begin)],
            static_cast<double>(l_.bonds[end]),
            cols_[at(begin)],
            rows_.back() / rows_[at(end)]};
  }

  const MpsLayout& l_;
  std::vector<double> rows_, cols_, places_;  // products of the factors before each site
};

}  // namespace

MpsPlan plan_attention(const MpsLayout& layout, int64_t items, int64_t features, MpsMethod method) {
  const Planner planner(layout);
  const double n = static_cast<double>(items), panels = ceil_div(static_cast<double>(features), kPanel);
  return planner.best(method, [&](const Group& g) {
    const double merged = planner.merging(g);
    if (g.end < layout.sites) {  // one call for many columns
      const double columns = g.rows_behind * panels * kPanel;
      return merged + products(n * g.columns_before, g.left * g.r, g.c * g.right, columns);
    }
    const double each = n * panels * g.columns_before;
    if (g.begin == 0) return merged + products(each, g.r, g.c, kPanel) + n * streamed(g.numbers());
    if (g.left < kLeastRows) {
      const double rows = std::min(g.r, kLeastRows);
      return merged + products(each * g.left * ceil_div(g.r, rows), rows, g.c, kPanel);
    }
    return merged + products(each * g.r, g.left, g.c, kPanel);
  });
}

MpsPlan plan_linear(const MpsLayout& layout, int64_t tokens, bool constant, MpsMethod method) {
  const Planner planner(layout);
  const double n = static_cast<double>(tokens);
  return planner.best(method, [&](const Group& g) {
    const double merged = constant ? 0.0 : planner.merging(g);
    if (g.end < layout.sites) {
      return merged + products(n * g.columns_before, g.c * g.right, g.left * g.r, g.rows_behind);
    }
    const double rows = n * g.columns_before, outputs = g.begin == 0 ? static_cast<double>(layout.cols) : g.c;
    const double inputs = g.begin == 0 ? static_cast<double>(layout.rows) : g.left * g.r;
    const double numbers = inputs * outputs, passes = ceil_div(n, 64.0);
    const double read = numbers > kNear ? passes * numbers * kRead : 0.0;
    return merged + std::max(products(ceil_div(outputs, kPanel), rows, inputs, kPanel), read) + passes * streamed(numbers);
  });
}

}  // namespace qexport
