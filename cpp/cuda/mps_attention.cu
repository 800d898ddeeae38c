// MPSAttention on the device. From the last group of sites on, the state is what is left of the columns, a bond, the row
// indices that are done, and the features:
//
//     (items, C c, bond, done, features) -> (items, C, bond', r done, features): the core (bond' r, c bond) times
//     (c bond, items C done features)
//
// which sorts no digit in memory. The groups in the params are those of the CPU and not used here: a device has other times.
#include <algorithm>

#include "kernels.h"
#include "train.cuh"

namespace qexport {
namespace cuda {
namespace {

// Sizes around the sites [begin, end): columns before them, rows behind.
struct Around {
  int64_t columns_before, rows_behind;
};
Around around(const MpsLayout& l, int64_t begin, int64_t end) {
  return {core_shape(l, 0, begin).c, core_shape(l, end, l.sites).r};
}

std::vector<int64_t> choose_groups(const MpsAttentionParams& p) {
  const MpsLayout& l = p.layout;
  return remembered_groups(l, {0, static_cast<int64_t>(p.type), p.trains, p.items, p.features}, [&] {
    MergeTimes merging(l, p.type, p.trains);
    return least_groups(l.sites, [&](int64_t begin, int64_t end) {
      const TrainCore core = core_shape(l, begin, end);
      const Around rest = around(l, begin, end);
      const int64_t n = p.items * rest.columns_before * rest.rows_behind * p.features;
      return merging(begin, end) + choose_tiling(p.type, p.trains, core.left * core.r, n, core.c * core.right).nanoseconds;
    });
  });
}

// Trains, items and features that go through all groups at once.
struct Piece {
  int64_t trains, items, features;
};

class TrainTimesValues {
 public:
  explicit TrainTimesValues(const MpsAttentionParams& params) : p_(params), l_(params.layout), ends_(choose_groups(params)) {
    int64_t done = 1;
    for (int64_t g = groups() - 1; g >= 0; --g) {
      const TrainCore core = shape(g);
      if (core_begin(g) + 1 < ends_[static_cast<size_t>(g)]) merged_ += core.numbers();
      done *= core.r;
      if (g > 0) state_ = std::max(state_, around(l_, core_begin(g), core_begin(g)).columns_before * core.left * done);
    }
    piece_ = {p_.trains, p_.items, p_.features};
    const auto numbers = [&] { return piece_.trains * (merged_ + state_ * piece_.items * piece_.features); };
    while (numbers() > kPieceNumbers && piece_.trains > 1) piece_.trains = ceil_div<int64_t>(piece_.trains, 2);
    while (numbers() > kPieceNumbers + merged_ && piece_.items > 1) piece_.items = ceil_div<int64_t>(piece_.items, 2);
    while (numbers() > kPieceNumbers + merged_ && piece_.features >= 128) {
      piece_.features = ceil_div<int64_t>(piece_.features, 128) * 64;
    }
  }

  void run(TrainRun& run, const MpsAttentionTensors& t) const {
    if (p_.trains == 0 || p_.items == 0 || p_.features == 0) return;
    const int64_t numbers = core_numbers();
    for (int64_t train = 0; train < p_.trains; train += piece_.trains) {
      const int64_t trains = std::min(piece_.trains, p_.trains - train);
      CoreMaker maker(run, l_, p_.type, trains, element(t.cores, p_.type, train * numbers));
      const size_t used = run.used();
      std::vector<TrainCore> cores;
      for (int64_t g = 0; g < groups(); ++g) cores.push_back(maker.make(core_begin(g), ends_[static_cast<size_t>(g)]));
      maker.queue();
      for (int64_t item = 0; item < p_.items; item += piece_.items) {
        for (int64_t feature = 0; feature < p_.features; feature += piece_.features) {
          const Piece count{trains, std::min(piece_.items, p_.items - item),
                            std::min(piece_.features, p_.features - feature)};
          const int64_t from = (train * p_.items + item) * l_.cols, to = (train * p_.items + item) * l_.rows;
          apply(run, cores, count, element(t.V, p_.type, from * p_.features + feature),
                element(t.Y, p_.type, to * p_.features + feature));
        }
      }
      run.give_back(used);
    }
  }

 private:
  int64_t groups() const { return static_cast<int64_t>(ends_.size()); }
  int64_t core_begin(int64_t g) const { return g == 0 ? 0 : ends_[static_cast<size_t>(g - 1)]; }
  TrainCore shape(int64_t g) const { return core_shape(l_, core_begin(g), ends_[static_cast<size_t>(g)]); }
  int64_t core_numbers() const {
    int64_t numbers = 0;
    for (int64_t k = 0; k < l_.sites; ++k) numbers += core_shape(l_, k, k + 1).numbers();
    return numbers;
  }

  void apply(TrainRun& run, const std::vector<TrainCore>& cores, const Piece& n, const void* V, const void* Y) const {
    const size_t used = run.used();
    const DType real = real_type(p_.type);
    const int64_t state_numbers = groups() > 1 ? n.trains * n.items * n.features * state_ : 0;
    const void* state[2] = {run.take(state_numbers), run.take(groups() > 2 ? state_numbers : 0)};
    const TrainCore whole = core_shape(l_, 0, l_.sites);
    const bool is_matrix = groups() == 1;  // which needs no padding
    int64_t C = whole.c, done = 1;
    for (int64_t g = groups() - 1; g >= 0; --g, std::swap(state[0], state[1])) {
      const TrainCore& core = cores[static_cast<size_t>(g)];
      const bool first = g + 1 == groups(), last = g == 0;
      const int64_t m = is_matrix ? l_.rows : core.left * core.r, k = is_matrix ? l_.cols : core.c * core.right;
      C /= core.c;
      Product p{};
      p.batch = n.trains;
      p.a = {core.data, core.type, core.batch, index_of(digit(m, core.c * core.right)), index_of(digit(k, 1)),
             kNoLimit,  kNoLimit};
      const Digit feature = digit(n.features, 1);
      if (first) {
        p.b = {V,
               p_.type,
               p_.items * l_.cols * p_.features,
               index_of(digit(k, p_.features, 1)),
               index_of(feature, digit(C, core.c * p_.features, core.c), digit(n.items, l_.cols * p_.features)),
               is_matrix || whole.c == l_.cols ? kNoLimit : l_.cols,
               kNoLimit};
      } else {
        const int64_t width = done * n.features;
        p.b = {state[1],
               real,
               n.items * C * k * width,
               index_of(digit(k, width)),
               index_of(digit(width, 1), digit(n.items * C, k * width)),
               kNoLimit,
               kNoLimit};
      }
      if (last) {
        p.c = {Y,
               p_.type,
               p_.items * l_.rows * p_.features,
               index_of(digit(m, done * p_.features, done)),
               index_of(feature, digit(done, p_.features, 1), digit(n.items, l_.rows * p_.features)),
               is_matrix || whole.r == l_.rows ? kNoLimit : l_.rows,
               kNoLimit};
      } else {
        const int64_t width = done * n.features;
        p.c = {state[0],
               real,
               n.items * C * m * width,
               index_of(digit(m, width)),
               index_of(digit(width, 1), digit(n.items * C, m * width)),
               kNoLimit,
               kNoLimit};
      }
      run.multiply(p);
      done *= core.r;
    }
    run.give_back(used);
  }

  const MpsAttentionParams& p_;
  const MpsLayout& l_;
  std::vector<int64_t> ends_;
  int64_t merged_ = 0;  // numbers in merged cores of a train
  int64_t state_ = 0;   // numbers of the largest state, per item and feature
  Piece piece_;
};

}  // namespace

size_t mps_attention_scratch_bytes(const MpsAttentionParams& params) {
  TrainRun run(params.type, nullptr);
  TrainTimesValues(params).run(run, {});
  return run.most();
}

const char* mps_attention(const MpsAttentionParams& params, const MpsAttentionTensors& tensors, const CudaCall& call) {
  TrainRun run(params.type, &call);
  TrainTimesValues(params).run(run, tensors);
  return run.status.text;
}

}  // namespace cuda
}  // namespace qexport
