// Merging of sites. A vector of bonds goes through a chain of sites, a warp for each vector; where that is more work than a
// product of two halves, or the bonds are too many, the halves are merged and multiplied.
#include <algorithm>
#include <map>

#include "train.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kChainWarps = 8;

template <class Real>
__global__ void __launch_bounds__(kChainWarps* kWarp) merge_chains(const __grid_constant__ Chains job) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  Real* state = dynamic_shared<Real>() + warp * 2 * kChainBond;
  Real* next = state + kChainBond;
  int64_t total = 0;
  for (int x = 0; x < job.count; ++x) total += job.chain[x].units;
  for (int64_t unit = int64_t{blockIdx.x} * kChainWarps + warp; unit < total; unit += int64_t{gridDim.x} * kChainWarps) {
    int x = 0;
    int64_t at = unit;
    while (at >= job.chain[x].units) at -= job.chain[x++].units;
    const Chain& chain = job.chain[x];
    // units are (train, left, row, column) from the left, (train, row, column, right) from the right
    const int64_t right = chain.site[chain.sites - 1].right;
    int64_t fixed = 0;
    if (chain.from_right) {
      const int64_t rest = quotient(at, right);
      fixed = at - rest * right, at = rest;
    }
    int64_t rest = quotient(at, chain.c);
    const int64_t column = at - rest * chain.c;
    at = rest, rest = quotient(at, chain.r);
    const int64_t row = at - rest * chain.r;
    int64_t train = rest;
    if (!chain.from_right) train = quotient(rest, chain.site[0].left), fixed = rest - train * chain.site[0].left;
    if (row >= chain.rows || column >= chain.cols) continue;
    Real* const result = static_cast<Real*>(chain.result) + train * chain.batch;
    const int64_t origin =
        (((chain.from_right ? 0 : fixed) * chain.r + row) * chain.pitch + column) * right + (chain.from_right ? fixed : 0);
    for (int step = 0; step < chain.sites; ++step) {
      const ChainSite& site = chain.site[chain.from_right ? chain.sites - 1 - step : step];
      const int64_t across = site.r * site.c * site.right;
      const int64_t i = quotient(row, site.rows_behind) % site.r, j = quotient(column, site.cols_behind) % site.c;
      const int64_t in_step = chain.from_right ? 1 : across, out_step = chain.from_right ? across : 1;
      const int64_t in = step == 0 ? 1 : chain.from_right ? site.right : site.left;
      const int64_t out = chain.from_right ? site.left : site.right;
      const int64_t start =
          train * job.numbers + site.at + (i * site.c + j) * site.right + (step == 0 ? fixed * in_step : 0);
      for (int64_t o = lane; o < out; o += kWarp) {
        Real sum{0};
        for (int64_t u = 0; u < in; ++u) {
          Real number;
          read_one(job.type, job.cores, start + u * in_step + o * out_step, number);
          sum = step == 0 ? number : sum + number * state[u];
        }
        if (step + 1 < chain.sites) {
          next[o] = sum;
        } else {
          result[origin + o * (chain.from_right ? chain.r * chain.pitch * right : 1)] = sum;
        }
      }
      __syncwarp();
      Real* const swap = state;
      state = next, next = swap;
    }
  }
}

double as_double(int64_t x) { return static_cast<double>(x); }

// Whether a chain may be one, and its time. Assumed of an H100: 5 operations a picosecond, each multiply-add of which reads
// the first cache; a microsecond from site to site; half a launch, which the chains of a call share.
bool fits_chain(const MpsLayout& l, int64_t begin, int64_t end) {
  if (end - begin > kChainSites) return false;
  for (int64_t k = begin + 1; k < end; ++k) {
    if (l.bonds[k] > kChainBond) return false;
  }
  return true;
}
double chain_nanoseconds(const MpsLayout& l, int64_t trains, int64_t begin, int64_t end) {
  const TrainCore core = core_shape(l, begin, end);
  const bool from_right = core.right < core.left;
  double each = 0.0;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t in = from_right ? l.bonds[k + 1] : l.bonds[k], out = from_right ? l.bonds[k] : l.bonds[k + 1];
    each += as_double(ceil_div<int64_t>(out, kWarp) * kWarp * (k == (from_right ? end - 1 : begin) ? 1 : in));
  }
  const double units = as_double(trains * core.r * core.c) * as_double(std::min(core.left, core.right));
  return 1250.0 + 1000.0 * as_double(end - begin) + units * each * 2.0 / 5000.0;
}

int64_t middle_of(const MpsLayout& l, int64_t begin, int64_t end) {
  return split_sites(
      begin, end, [&](int64_t k) { return std::max(core_shape(l, begin, k).numbers(), core_shape(l, k, end).numbers()); });
}

// result[a, (I, i), (J, j), b] = sum_x p[a, I, J, x] q[x, i, j, b]; a row of the result has room for `pitch` columns.
Product combine(const TrainCore& p, const TrainCore& q, const TrainCore& result, int64_t trains, int64_t pitch, int64_t rows,
                int64_t cols) {
  const int64_t right = q.right, width = q.c * right;
  const Strided a{p.data,   p.type,  p.batch, index_of(digit(p.left * p.r * p.c, p.right)), index_of(digit(p.right, 1)),
                  kNoLimit, kNoLimit};
  const Strided b{q.data,   q.type,  q.batch, index_of(digit(q.left, q.r * width)), index_of(digit(q.r * width, 1)),
                  kNoLimit, kNoLimit};
  const Strided c{result.data,
                  result.type,
                  result.batch,
                  index_of(digit(p.c, width, 0, q.c), digit(p.left * p.r, q.r * pitch * right, q.r, 0)),
                  index_of(digit(width, 1, 0, 1), digit(q.r, pitch * right, 1, 0)),
                  rows < result.r ? rows : kNoLimit,
                  cols < result.c ? cols : kNoLimit};
  return {{}, trains, a, b, c, nullptr};
}

}  // namespace

TrainCore core_shape(const MpsLayout& l, int64_t begin, int64_t end) {
  TrainCore core{nullptr, DType::f32, l.bonds[begin], 1, 1, l.bonds[end], 0};
  for (int64_t k = begin; k < end; ++k) core.r *= l.row_factors[k], core.c *= l.col_factors[k];
  return core;
}

TrainRun::TrainRun(DType type, const CudaCall* call) : type_(type), call_(call) {}

void* TrainRun::take(int64_t elements) {
  char* const p = dry() ? nullptr : static_cast<char*>(call_->scratch) + used_;
  used_ += static_cast<size_t>((elements * bytes_of(real_type(type_)) + 255) / 256 * 256);
  most_ = std::max(most_, used_);
  return p;
}

void TrainRun::multiply(Product p) {
  p.type = type_;
  const size_t used = used_;
  const Tiling tiling = choose_tiling(p.type, p.batch, p.c.i.count, p.c.j.count, p.a.j.count);
  void* const partials = take(tiling.partials);
  if (!dry()) cuda::multiply(status, p, partials, call_->stream);
  used_ = used;
}

CoreMaker::CoreMaker(TrainRun& run, const MpsLayout& layout, DType type, int64_t trains, const void* cores)
    : run_(run), l_(layout), times_(layout, type, trains), chains_{cores, type, 0, trains, 0, {}} {
  for (int64_t k = 0; k < l_.sites; ++k) chains_.numbers += core_shape(l_, k, k + 1).numbers();
}

TrainCore CoreMaker::make(int64_t begin, int64_t end) {
  TrainCore core = core_shape(l_, begin, end);
  if (end - begin == 1) {
    int64_t at = 0;
    for (int64_t k = 0; k < begin; ++k) at += core_shape(l_, k, k + 1).numbers();
    core.type = chains_.type, core.batch = chains_.numbers;
    core.data = element(chains_.cores, core.type, at);
    return core;
  }
  core.type = real_type(chains_.type), core.batch = core.numbers();
  core.data = run_.take(core.numbers() * chains_.trains);
  merge(begin, end, core, core.c, core.r, core.c);
  return core;
}

void CoreMaker::decode(void* matrix) {
  TrainCore core = core_shape(l_, 0, l_.sites);
  core.type = real_type(chains_.type), core.batch = l_.rows * l_.cols;
  core.data = matrix;
  merge(0, l_.sites, core, l_.cols, l_.rows, l_.cols);
  queue();
}

void CoreMaker::merge(int64_t begin, int64_t end, TrainCore result, int64_t pitch, int64_t rows, int64_t cols) {
  if (times_.is_chain(begin, end)) return add_chain(begin, end, result, pitch, rows, cols);
  const int64_t middle = middle_of(l_, begin, end);
  const size_t used = run_.used();
  const TrainCore left = make(begin, middle), right = make(middle, end);
  queue();
  run_.multiply(combine(left, right, result, chains_.trains, pitch, rows, cols));
  run_.give_back(used);
}

void CoreMaker::add_chain(int64_t begin, int64_t end, const TrainCore& result, int64_t pitch, int64_t rows, int64_t cols) {
  if (chains_.count == kChains) queue();
  Chain& chain = chains_.chain[chains_.count++];
  chain = {const_cast<void*>(result.data),
           result.batch,
           result.r,
           result.c,
           pitch,
           rows,
           cols,
           0,
           result.right < result.left,
           static_cast<int>(end - begin),
           {}};
  chain.units = chains_.trains * result.r * result.c * std::min(result.left, result.right);
  int64_t at = 0;
  for (int64_t k = 0; k < end; ++k) {
    const TrainCore site = core_shape(l_, k, k + 1), behind = core_shape(l_, k + 1, end);
    if (k >= begin) chain.site[k - begin] = {at, site.left, site.r, site.c, site.right, behind.r, behind.c};
    at += site.numbers();
  }
}

void CoreMaker::queue() {
  int64_t units = 0;
  for (int x = 0; x < chains_.count; ++x) units += chains_.chain[x].units;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(units, kChainWarps), 1 << 20));
  if (!run_.dry() && chains_.type == DType::f64) {
    launch(run_.status, merge_chains<double>, dim3(blocks), dim3(kChainWarps * kWarp),
           2 * kChainWarps * kChainBond * sizeof(double), run_.call_->stream, chains_);
  } else if (!run_.dry()) {
    launch(run_.status, merge_chains<float>, dim3(blocks), dim3(kChainWarps * kWarp),
           2 * kChainWarps * kChainBond * sizeof(float), run_.call_->stream, chains_);
  }
  chains_.count = 0;
}

MergeTimes::MergeTimes(const MpsLayout& layout, DType type, int64_t trains)
    : l_(layout), type_(type), trains_(trains), known_(static_cast<size_t>((l_.sites + 1) * (l_.sites + 1)), -1.0) {}

double MergeTimes::operator()(int64_t begin, int64_t end) {
  if (end - begin == 1) return 0.0;
  double& known = known_[static_cast<size_t>(begin * (l_.sites + 1) + end)];
  if (known < 0.0) {
    const double by_halves = halves(begin, end);
    known = fits_chain(l_, begin, end) ? std::min(by_halves, chain_nanoseconds(l_, trains_, begin, end)) : by_halves;
  }
  return known;
}

double MergeTimes::halves(int64_t begin, int64_t end) {
  const int64_t middle = middle_of(l_, begin, end);
  const TrainCore p = core_shape(l_, begin, middle), q = core_shape(l_, middle, end);
  return (*this)(begin, middle) + (*this)(middle, end) +
         choose_tiling(type_, trains_, p.left * p.r * p.c, q.r * q.c * q.right, p.right).nanoseconds;
}

bool MergeTimes::is_chain(int64_t begin, int64_t end) {
  if (end - begin == 1) return true;
  return fits_chain(l_, begin, end) && chain_nanoseconds(l_, trains_, begin, end) <= (*this)(begin, end);
}

std::vector<int64_t> remembered_groups(const MpsLayout& l, std::vector<int64_t> key,
                                       const std::function<std::vector<int64_t>()>& choose) {
  constexpr size_t kMost = 1024;
  thread_local std::map<std::vector<int64_t>, std::vector<int64_t>> known;
  key.insert(key.end(), l.row_factors, l.row_factors + l.sites);
  key.insert(key.end(), l.col_factors, l.col_factors + l.sites);
  key.insert(key.end(), l.bonds, l.bonds + l.sites + 1);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= kMost) known.clear();
  return known[key] = choose();
}

}  // namespace cuda
}  // namespace qexport
