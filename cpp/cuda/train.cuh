// Trains of cores on the device: merged sites, and which to merge. A call runs twice over the same steps: dry, to count the
// scratch, then to queue them.
#pragma once

#include <functional>
#include <vector>

#include "qexport/mps_product.h"
#include "strided_product.cuh"

namespace qexport {
namespace cuda {

// The merged core of some sites, of each train of a batch: (left, r, c, right), row-major.
struct TrainCore {
  const void* data;
  DType type;
  int64_t left, r, c, right;
  int64_t batch;  // elements from train to train
  int64_t numbers() const { return left * r * c * right; }
};
TrainCore core_shape(const MpsLayout& layout, int64_t begin, int64_t end);  // without data

// The type of what is made on the way.
inline DType real_type(DType type) { return type == DType::f64 ? DType::f64 : DType::f32; }
inline const void* element(const void* data, DType type, int64_t at) {
  return data ? static_cast<const char*>(data) + at * bytes_of(type) : nullptr;  // null: dry
}

// A chain of at most so many sites, of bonds at most so large, is merged by one kernel, up to four chains at once.
constexpr int kChainSites = 12;
constexpr int64_t kChainBond = 256;
constexpr int kChains = 4;

// A site of a chain, where it begins in the cores of its train, and the digits behind it.
struct ChainSite {
  int64_t at, left, r, c, right, rows_behind, cols_behind;
};
struct Chain {
  void* result;
  int64_t batch;                    // elements from result to result
  int64_t r, c, pitch, rows, cols;  // columns that a row of the result has room for; the limits of both
  int64_t units;                    // row vectors from the left or column vectors from the right, of all trains
  bool from_right;
  int sites;
  ChainSite site[kChainSites];
};
struct Chains {
  const void* cores;
  DType type;
  int64_t numbers;  // from train to train
  int64_t trains;
  int count;
  Chain chain[kChains];
};

// The steps of a call: where they are queued, the scratch they take, each piece aligned to 256.
class TrainRun {
 public:
  TrainRun(DType type, const CudaCall* call);  // null: dry
  bool dry() const { return call_ == nullptr; }
  void* take(int64_t elements);  // of the real type
  size_t used() const { return used_; }
  void give_back(size_t used) { used_ = used; }
  size_t most() const { return most_; }
  void multiply(Product product);  // sets its type

  Status status;

 private:
  friend class CoreMaker;
  DType type_;
  const CudaCall* call_;
  size_t used_ = 0, most_ = 0;
};

// Estimated nanoseconds to merge sites, each found once.
class MergeTimes {
 public:
  MergeTimes(const MpsLayout& layout, DType type, int64_t trains);
  double operator()(int64_t begin, int64_t end);
  bool is_chain(int64_t begin, int64_t end);  // what takes less time, or may be done alone

 private:
  double halves(int64_t begin, int64_t end);

  const MpsLayout& l_;
  DType type_;
  int64_t trains_;
  std::vector<double> known_;
};

// Merges sites of trains whose cores lie behind each other.
class CoreMaker {
 public:
  CoreMaker(TrainRun& run, const MpsLayout& layout, DType type, int64_t trains, const void* cores);
  // The core of the sites [begin, end): that of one site where it lies, others in scratch, ready behind the next `queue`.
  TrainCore make(int64_t begin, int64_t end);
  // The matrices of the trains, (trains, rows, cols), without what the factors pad.
  void decode(void* matrix);
  void queue();

 private:
  void merge(int64_t begin, int64_t end, TrainCore result, int64_t pitch, int64_t rows, int64_t cols);
  void add_chain(int64_t begin, int64_t end, const TrainCore& result, int64_t pitch, int64_t rows, int64_t cols);

  TrainRun& run_;
  const MpsLayout& l_;
  MergeTimes times_;
  Chains chains_;
};

// Ends of the groups that take the least time, by nanoseconds(begin, end) of each.
template <class Cost>
std::vector<int64_t> least_groups(int64_t sites, const Cost& nanoseconds) {
  std::vector<double> least(static_cast<size_t>(sites + 1), 0.0);
  std::vector<int64_t> from(static_cast<size_t>(sites + 1), 0), ends;
  for (int64_t end = 1; end <= sites; ++end) {
    for (int64_t begin = 0; begin < end; ++begin) {
      const double time = least[static_cast<size_t>(begin)] + nanoseconds(begin, end);
      if (begin > 0 && time >= least[static_cast<size_t>(end)]) continue;
      least[static_cast<size_t>(end)] = time, from[static_cast<size_t>(end)] = begin;
    }
  }
  for (int64_t end = sites; end > 0; end = from[static_cast<size_t>(end)]) ends.insert(ends.begin(), end);
  return ends;
}

// The same from call to call of a thread: choosing takes longer than most products. `key` is what groups depend on beside
// the sites.
std::vector<int64_t> remembered_groups(const MpsLayout& layout, std::vector<int64_t> key,
                                       const std::function<std::vector<int64_t>()>& choose);

// States and merged cores of a piece of work stay below so many numbers where they can: they then stay in the second cache.
constexpr int64_t kPieceNumbers = int64_t{1} << 23;

}  // namespace cuda
}  // namespace qexport
