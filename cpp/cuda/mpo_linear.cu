// MPOLinear on the device. From the first group of sites on, the state is, for each token, what is done of the outputs, a
// bond, and what is left of the inputs:
//
//     (tokens, done, bond r, rest) -> (tokens, done c, bond', rest): the core (bond r, c bond') transposed times
//     (bond r, tokens done rest)
//
// and in the last group, where nothing is left, (tokens done, bond r) times the core. The groups in the params are those of
// the CPU and not used here: a device has other times.
#include <algorithm>

#include "kernels.h"
#include "train.cuh"

namespace qexport {
namespace cuda {
namespace {

std::vector<int64_t> choose_groups(const MpoLinearParams& p) {
  const MpsLayout& l = p.layout;
  return remembered_groups(l, {1, static_cast<int64_t>(p.type), p.tokens}, [&] {
    MergeTimes merging(l, p.type, 1);
    return least_groups(l.sites, [&](int64_t begin, int64_t end) {
      const TrainCore core = core_shape(l, begin, end);
      const int64_t n = p.tokens * core_shape(l, 0, begin).c * core_shape(l, end, l.sites).r;
      return merging(begin, end) + choose_tiling(p.type, 1, core.c * core.right, n, core.left * core.r).nanoseconds;
    });
  });
}

class RowsTimesTrain {
 public:
  explicit RowsTimesTrain(const MpoLinearParams& params) : p_(params), l_(params.layout), ends_(choose_groups(params)) {
    int64_t done = 1, rest = core_shape(l_, 0, l_.sites).r;
    for (int64_t g = 0; g + 1 < groups(); ++g) {
      const TrainCore core = core_shape(l_, core_begin(g), ends_[static_cast<size_t>(g)]);
      done *= core.c, rest /= core.r;
      state_ = std::max(state_, done * core.right * rest);
    }
    tokens_ = p_.tokens;
    if (state_ > 0) tokens_ = std::min(tokens_, std::max<int64_t>(1, kPieceNumbers / state_));
  }

  void run(TrainRun& run, const MpoLinearTensors& t) const {
    if (p_.tokens == 0) return;
    CoreMaker maker(run, l_, p_.type, 1, t.weights);
    std::vector<TrainCore> cores;
    for (int64_t g = 0; g < groups(); ++g) cores.push_back(maker.make(core_begin(g), ends_[static_cast<size_t>(g)]));
    maker.queue();
    const void* state[2] = {run.take(tokens_ * state_), run.take(groups() > 2 ? tokens_ * state_ : 0)};
    for (int64_t token = 0; token < p_.tokens; token += tokens_) {
      apply(run, cores, state[0], state[1], std::min(tokens_, p_.tokens - token), element(t.x, p_.type, token * l_.rows),
            t.bias, element(t.y, p_.type, token * l_.cols));
    }
  }

 private:
  int64_t groups() const { return static_cast<int64_t>(ends_.size()); }
  int64_t core_begin(int64_t g) const { return g == 0 ? 0 : ends_[static_cast<size_t>(g - 1)]; }

  void apply(TrainRun& run, const std::vector<TrainCore>& cores, const void* to, const void* from, int64_t tokens,
             const void* x, const void* bias, const void* y) const {
    const DType real = real_type(p_.type);
    const TrainCore whole = core_shape(l_, 0, l_.sites);
    const bool is_matrix = groups() == 1;  // which needs no padding
    int64_t done = 1, rest = whole.r;
    for (int64_t g = 0; g < groups(); ++g, std::swap(to, from)) {
      const TrainCore& core = cores[static_cast<size_t>(g)];
      const int64_t k = is_matrix ? l_.rows : core.left * core.r, out = core.c * core.right;
      rest /= core.r;
      const Strided weight{core.data, core.type, 0, index_of(digit(k, out)), index_of(digit(is_matrix ? l_.cols : out, 1)),
                           kNoLimit,  kNoLimit};
      Product p{};
      p.batch = 1;
      const Digit left = digit(rest, 1, 0, 1);
      Strided state{from,     real,    0, index_of(digit(k, rest)), index_of(left, digit(tokens * done, k * rest)),
                    kNoLimit, kNoLimit};
      if (g == 0) {
        state = {x,
                 p_.type,
                 0,
                 index_of(digit(k, rest, 0, rest)),
                 index_of(left, digit(tokens, l_.rows)),
                 kNoLimit,
                 is_matrix || whole.r == l_.rows ? kNoLimit : l_.rows};
      }
      if (g + 1 < groups()) {
        p.a = transposed(weight), p.b = state;
        p.c = {to,       real,    0, index_of(digit(out, rest)), index_of(left, digit(tokens * done, out * rest)),
               kNoLimit, kNoLimit};
      } else {
        p.a = transposed(state), p.b = weight, p.bias = bias;
        p.c = {y,
               p_.type,
               0,
               index_of(digit(done, out, 0, out), digit(tokens, l_.cols)),
               index_of(digit(is_matrix ? l_.cols : out, 1, 0, 1)),
               kNoLimit,
               whole.c == l_.cols ? kNoLimit : l_.cols};
      }
      run.multiply(p);
      done *= core.c;
    }
  }
  static Strided transposed(Strided s) {
    std::swap(s.i, s.j);
    return s;
  }

  const MpoLinearParams& p_;
  const MpsLayout& l_;
  std::vector<int64_t> ends_;
  int64_t state_ = 0;  // numbers of the largest state of a token
  int64_t tokens_;     // that go through all groups at once
};

}  // namespace

size_t mpo_linear_scratch_bytes(const MpoLinearParams& params) {
  TrainRun run(params.type, nullptr);
  RowsTimesTrain(params).run(run, {});
  return run.most();
}

const char* mpo_linear(const MpoLinearParams& params, const MpoLinearTensors& tensors, const CudaCall& call) {
  TrainRun run(params.type, &call);
  RowsTimesTrain(params).run(run, tensors);
  return run.status.text;
}

}  // namespace cuda
}  // namespace qexport
