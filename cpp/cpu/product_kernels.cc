// MPSDecode and products with trains. Compiled once per instruction set, as row_kernels.cc. float16 and bfloat16 are
// float32 inside.
#include "mpo_linear.h"
#include "mps_attention.h"
#include "mps_decode.h"
#include "mps_product.h"

namespace qexport {
namespace QEXPORT_ISA {
namespace {

char* aligned(void* p) { return static_cast<char*>(p) + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }

int64_t numbers_of(const MpsLayout& l) {
  int64_t numbers = 0;
  for (int64_t k = 0; k < l.sites; ++k) numbers += shape_of<float>(l, k, k + 1).numbers();
  return numbers;
}

// body(i, scratch, parallel) for each train of a batch, with the parallel-for that is left for its inside; of `one` bytes of
// scratch each. Without scratch: the bytes for all that run at once.
template <class Body>
size_t for_each_train(int64_t trains, size_t one, char* scratch, const ParallelFor& parallel, const Body& body) {
  const int workers = static_cast<int>(trains > 1 ? std::min<int64_t>(parallel.max_threads, trains) : 1);
  if (!scratch) return one * static_cast<size_t>(workers);
  const ParallelFor inner = trains > 1 ? alone() : parallel;
  for_each_piece(trains, workers, scratch, one, parallel, [&](int64_t train, char* own) { body(train, own, inner); });
  return 0;
}

template <class Real>
size_t decode_as(const MpsDecodeParams& p, const MpsDecodeTensors& t, char* scratch, const ParallelFor& parallel) {
  const int64_t numbers = numbers_of(p.layout);
  const size_t one = decode_train<Real>(p, nullptr, nullptr, nullptr, parallel);
  return for_each_train(p.batch, one, scratch, parallel, [&](int64_t train, char* own, const ParallelFor& inner) {
    decode_train(p, static_cast<const Real*>(t.cores) + train * numbers,
                 static_cast<Real*>(t.matrix) + train * p.layout.rows * p.layout.cols, own, inner);
  });
}

size_t decode_scratch_bytes(const MpsDecodeParams& p, const ParallelFor& parallel) {
  return 64 +
         (p.type == DType::f64 ? decode_as<double>(p, {}, nullptr, parallel) : decode_as<float>(p, {}, nullptr, parallel));
}

void decode(const MpsDecodeParams& p, const MpsDecodeTensors& t, void* scratch, const ParallelFor& parallel) {
  if (p.type == DType::f64) {
    decode_as<double>(p, t, aligned(scratch), parallel);
  } else {
    decode_as<float>(p, t, aligned(scratch), parallel);
  }
}

template <class Real>
size_t attention_as(const MpsAttentionParams& p, const MpsAttentionTensors& t, char* scratch, const ParallelFor& parallel) {
  const TrainTimesValues<Real> product(p);
  const size_t one = product.run(nullptr, nullptr, nullptr, nullptr, p.trains > 1 ? alone() : parallel);
  const int64_t size = bytes_of(p.type), numbers = numbers_of(p.layout), items = p.items * p.features * size;
  return for_each_train(p.trains, one, scratch, parallel, [&](int64_t train, char* own, const ParallelFor& inner) {
    product.run(static_cast<const char*>(t.cores) + train * numbers * size,
                static_cast<const char*>(t.V) + train * items * p.layout.cols,
                static_cast<char*>(t.Y) + train * items * p.layout.rows, own, inner);
  });
}

size_t attention_scratch_bytes(const MpsAttentionParams& p, const ParallelFor& parallel) {
  return 64 + (p.type == DType::f64 ? attention_as<double>(p, {}, nullptr, parallel)
                                    : attention_as<float>(p, {}, nullptr, parallel));
}

void attention(const MpsAttentionParams& p, const MpsAttentionTensors& t, void* scratch, const ParallelFor& parallel) {
  if (p.type == DType::f64) {
    attention_as<double>(p, t, aligned(scratch), parallel);
  } else {
    attention_as<float>(p, t, aligned(scratch), parallel);
  }
}

size_t weight_bytes(const MpoLinearParams& p) {
  return p.type == DType::f64 ? weight_bytes_of<double>(p) : weight_bytes_of<float>(p);
}

size_t prepare_scratch_bytes(const MpoLinearParams& p) {
  return 64 + (p.type == DType::f64 ? prepare_weight<double>(p, nullptr, nullptr, nullptr, alone())
                                    : prepare_weight<float>(p, nullptr, nullptr, nullptr, alone()));
}

void prepare(const MpoLinearParams& p, const void* cores, void* weights, void* scratch, const ParallelFor& parallel) {
  if (p.type == DType::f64) {
    prepare_weight(p, cores, static_cast<double*>(weights), aligned(scratch), parallel);
  } else {
    prepare_weight(p, cores, static_cast<float*>(weights), aligned(scratch), parallel);
  }
}

size_t linear_scratch_bytes(const MpoLinearParams& p, const ParallelFor& parallel) {
  return 64 + (p.type == DType::f64 ? RowsTimesTrain<double>(p).run({}, nullptr, parallel)
                                    : RowsTimesTrain<float>(p).run({}, nullptr, parallel));
}

void linear(const MpoLinearParams& p, const MpoLinearTensors& t, void* scratch, const ParallelFor& parallel) {
  if (p.type == DType::f64) {
    RowsTimesTrain<double>(p).run(t, aligned(scratch), parallel);
  } else {
    RowsTimesTrain<float>(p).run(t, aligned(scratch), parallel);
  }
}

}  // namespace

extern const MpsProductKernels mps_product_kernels;
const MpsProductKernels mps_product_kernels = {
    decode_scratch_bytes,  decode,  attention_scratch_bytes, attention, weight_bytes,
    prepare_scratch_bytes, prepare, linear_scratch_bytes,    linear};

}  // namespace QEXPORT_ISA
}  // namespace qexport
