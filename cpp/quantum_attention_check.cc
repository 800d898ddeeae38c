// The one place where attributes and shapes are checked; the kernels behind it take them as given.
#include "qexport/quantum_attention_check.h"

#include <algorithm>
#include <cmath>

#include "qexport/key_summary.h"

namespace qexport {
namespace {

constexpr const char* kOp = "[QuantumAttention] ";
constexpr const char* kStrategies[] = {"exact", "naive", "stratified", "adaptive", "hybrid", "tree"};
constexpr const char* kPrecisions[] = {"fp32", "bf16", "int8", "auto"};
// A softcap beyond these does what they do to scores of float32; its inverse, or its value in base 2, might not fit.
constexpr float kLeastCap = 1e-30f, kMostCap = 1e30f;
constexpr const char* kResiduals[] = {"none", "verify_only", "unbiased", "james_stein"};

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(kOp + message); }

[[noreturn]] void fail_shape(const char* name, const Shape& shape, const std::string& expected) {
  fail(std::string(name) + " has shape " + to_string(shape) + ", expected " + expected);
}

// The place of `value` among `choices`, which are in the order of the enum that it stands for.
template <class Enum, size_t kCount>
Enum choice_of(const char* attribute, const char* const (&choices)[kCount], const std::string& value) {
  std::string known;
  for (size_t i = 0; i < kCount; ++i) {
    if (value == choices[i]) return static_cast<Enum>(i);
    known += (i ? ", " : "") + std::string(choices[i]);
  }
  fail(std::string(attribute) + " must be one of " + known + ", got '" + value + "'");
}

Strategy strategy_of(const QuantumAttentionAttributes& a) {
  return choice_of<Strategy>("strategy", kStrategies, a.strategy);
}

Precision precision_of(const QuantumAttentionAttributes& a) {
  return choice_of<Precision>("precision", kPrecisions, a.precision);
}

Residual residual_of(const QuantumAttentionAttributes& a) { return choice_of<Residual>("residual", kResiduals, a.residual); }

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  const std::string limit =
      most == INT64_MAX ? ">= " + std::to_string(least) : "in " + std::to_string(least) + " to " + std::to_string(most);
  fail(std::string(name) + " must be " + limit + ", got " + std::to_string(value));
}

void check_shape(const char* name, const TensorView& tensor, const std::vector<int64_t>& expected, const char* meaning) {
  bool same = tensor.shape.rank == static_cast<int>(expected.size());
  Shape wanted{static_cast<int>(expected.size()), {}};
  for (size_t i = 0; i < expected.size(); ++i) {
    wanted.dim[i] = expected[i];
    same = same && tensor.shape.dim[i] == expected[i];
  }
  if (!same) fail_shape(name, tensor.shape, to_string(wanted) + " (" + meaning + ")");
}

// Sizes of one of Q, K, V, whichever layout it has: (b, heads, n, size) or (b, n, heads * size).
struct HeadView {
  int64_t batch, heads, len, size;
  HeadRows rows;
};

HeadView head_view(const char* name, const TensorView& tensor, int64_t heads, const char* heads_name) {
  const int64_t* d = tensor.shape.dim;
  if (tensor.shape.rank == 4) return {d[0], d[1], d[2], d[3], {tensor.data, d[1] * d[2] * d[3], d[2] * d[3], d[3]}};
  if (tensor.shape.rank != 3) fail_shape(name, tensor.shape, "3 or 4 dimensions");
  if (heads == 0) fail(std::string(name) + " has 3 dimensions, which needs the attribute " + heads_name);
  if (d[2] % heads != 0) {
    fail_shape(name, tensor.shape,
               "a last dimension that " + std::string(heads_name) + " = " + std::to_string(heads) + " divides");
  }
  return {d[0], heads, d[1], d[2] / heads, {tensor.data, d[1] * d[2], d[2] / heads, d[2]}};
}

AttentionMask mask_view(const TensorView& mask, int64_t batch, int64_t heads, int64_t q_len, int64_t total_len) {
  if (!mask.present) return {nullptr, DType::f32, 0, 0, 0, 0};
  if (mask.type == DType::i64 || mask.type == DType::f64) {
    fail(std::string("attn_mask must be float, float16, bfloat16 or bool, got ") +
         (mask.type == DType::i64 ? "int64" : "float64"));
  }
  const int64_t full[4] = {batch, heads, q_len, total_len};
  const Shape wanted{4, {batch, heads, q_len, total_len}};
  if (mask.shape.rank < 1 || mask.shape.rank > 4) fail_shape("attn_mask", mask.shape, "1 to 4 dimensions");
  int64_t dims[4] = {1, 1, 1, 1};
  for (int i = 0; i < mask.shape.rank; ++i) dims[4 - mask.shape.rank + i] = mask.shape.dim[i];
  for (int i = 0; i < 4; ++i) {
    if (i < 3 ? dims[i] != 1 && dims[i] != full[i] : dims[i] > full[i]) {
      fail_shape("attn_mask", mask.shape,
                 "one that broadcasts to " + to_string(wanted) + " (batch, q_heads, q_len, total_len)");
    }
  }
  static const char no_elements = 0;  // a mask of length 0 masks every key and may come without a pointer
  return {mask.data ? mask.data : &no_elements,
          mask.type,
          dims[0] == 1 ? 0 : dims[1] * dims[2] * dims[3],
          dims[1] == 1 ? 0 : dims[2] * dims[3],
          dims[2] == 1 ? 0 : dims[3],
          dims[3]};
}

}  // namespace

void check_attributes(const QuantumAttentionAttributes& a) {
  const Strategy strategy = strategy_of(a);
  const Precision precision = precision_of(a);
  residual_of(a);
  if (strategy != Strategy::exact && strategy != Strategy::tree &&
      (precision == Precision::bf16 || precision == Precision::int8)) {
    fail("precision must be fp32 or auto with strategy " + a.strategy + ", got " + a.precision);
  }
  if (!(a.error_tolerance >= 0.0f && a.error_tolerance <= 1.0f)) {
    fail("error_tolerance must be in 0 to 1, got " + std::to_string(a.error_tolerance));
  }
  if (a.error_tolerance > 0.0f && strategy != Strategy::tree) {
    fail("error_tolerance needs strategy tree, got " + a.strategy + "; set it to 0");
  }
  if (a.num_samples.empty()) fail("num_samples must hold one number, or one per query head, got none");
  for (const int64_t samples : a.num_samples) {
    if (samples <= 0) fail("num_samples must be > 0, got " + std::to_string(samples));
    check_range("num_samples", samples, 1, INT32_MAX);
  }
  check_range("control_variate", a.control_variate, 0, 1);
  check_range("layer", a.layer, 0, UINT32_MAX);
  check_range("is_causal", a.is_causal, 0, 1);
  check_range("qk_matmul_output_mode", a.qk_matmul_output_mode, 0, 3);
  check_range("left_window_size", a.left_window_size, -1, INT64_MAX);
  check_range("right_window_size", a.right_window_size, -1, INT64_MAX);
  if (!(a.softcap >= 0.0f) || std::isinf(a.softcap))
    fail("softcap must be >= 0 and finite, got " + std::to_string(a.softcap));
  if (a.has_scale && !std::isfinite(a.scale)) fail("scale must be finite, got " + std::to_string(a.scale));
  if (a.q_num_heads < 0) check_range("q_num_heads", a.q_num_heads, 1, INT64_MAX);
  if (a.kv_num_heads < 0) check_range("kv_num_heads", a.kv_num_heads, 1, INT64_MAX);
}

void check_error_estimate(Strategy strategy) {
  if (strategy == Strategy::exact || strategy == Strategy::tree) return;
  fail(std::string("error_estimate needs strategy exact or tree, got ") + kStrategies[static_cast<int>(strategy)]);
}

void check_outputs(const QuantumAttentionCall& call) {
  const QuantumAttentionParams& p = call.params;
  const QuantumAttentionTensors& t = call.tensors;
  const int64_t element = p.type == DType::f32 ? 4 : 2, heads = p.batch * p.kv_heads;
  const auto check = [&](const char* name, const HeadRows& past, const void* present, int64_t size) {
    const auto from = reinterpret_cast<uintptr_t>(past.data), to = reinterpret_cast<uintptr_t>(present);
    const auto bytes = [&](int64_t len) { return static_cast<uintptr_t>(heads * len * size * element); };
    if (!from || !to || from + bytes(p.past_len) <= to || to + bytes(p.past_len + p.kv_len) <= from) return;
    if (from == to && heads == 1) return;
    fail(std::string("present_") + name + " shares the memory of past_" + name +
         ", which needs batch = kv_heads = 1 and the same start; use a static buffer with nonpad_kv_seqlen instead");
  };
  if (t.present_key_summary && !t.key_summary) fail("present_key_summary needs the input key_summary, zeros at first");
  check("key", t.past_key, t.present_key, p.head_size);
  check("value", t.past_value, t.present_value, p.v_head_size);
}

QuantumAttentionCall resolve_call(const QuantumAttentionAttributes& a, const QuantumAttentionInputs& in) {
  const HeadView q = head_view("Q", in.q, a.q_num_heads, "q_num_heads");
  const HeadView k = head_view("K", in.k, a.kv_num_heads, "kv_num_heads");
  const HeadView v = head_view("V", in.v, a.kv_num_heads, "kv_num_heads");
  if (in.k.shape.rank != in.q.shape.rank) fail_shape("K", in.k.shape, "as many dimensions as Q, " + to_string(in.q.shape));
  if (in.v.shape.rank != in.q.shape.rank) fail_shape("V", in.v.shape, "as many dimensions as Q, " + to_string(in.q.shape));
  if (k.batch != q.batch) fail_shape("K", in.k.shape, "the batch size of Q, " + std::to_string(q.batch));
  if (k.size != q.size) fail_shape("K", in.k.shape, "the head_size of Q, " + std::to_string(q.size));
  if (v.batch != k.batch || v.heads != k.heads || v.len != k.len) {
    fail_shape("V", in.v.shape, "the batch size, kv_heads and kv_len of K, " + to_string(in.k.shape));
  }
  if (k.heads == 0 || q.heads % k.heads != 0) {
    fail("q_heads must be a multiple of kv_heads, got " + std::to_string(q.heads) + " and " + std::to_string(k.heads));
  }
  if (q.size == 0 || v.size == 0)
    fail_shape(q.size == 0 ? "Q" : "V", q.size == 0 ? in.q.shape : in.v.shape, "a head_size above 0");
  if (in.past_key.present != in.past_value.present) fail("past_key and past_value must be given together");
  int64_t past_len = 0;
  if (in.past_key.present) {
    past_len = in.past_key.shape.rank == 4 ? in.past_key.shape.dim[2] : 0;
    check_shape("past_key", in.past_key, {q.batch, k.heads, past_len, k.size}, "batch, kv_heads, past_len, head_size");
    check_shape("past_value", in.past_value, {q.batch, k.heads, past_len, v.size}, "batch, kv_heads, past_len, v_head_size");
  }
  if (in.nonpad_kv_seqlen) {
    if (in.past_key.present) fail("nonpad_kv_seqlen cannot be combined with past_key");
    if (in.nonpad_shape.rank != 1 || in.nonpad_shape.dim[0] != q.batch) {
      fail_shape("nonpad_kv_seqlen", in.nonpad_shape, "(" + std::to_string(q.batch) + ",), one number per batch item");
    }
  }
  const int64_t total_len = past_len + k.len;
  const Shape summary{4, {q.batch, k.heads, summary_chunks(total_len), summary_row(k.size, v.size)}};
  if (in.key_summary.present) {
    if (strategy_of(a) != Strategy::tree) fail("key_summary needs strategy tree, got " + a.strategy);
    if (!in.nonpad_kv_seqlen) fail("key_summary needs nonpad_kv_seqlen: a static buffer, of which it is the state");
    if (in.key_summary.type != DType::f32) fail("key_summary must be float32");
    check_shape("key_summary", in.key_summary, {summary.dim, summary.dim + 4},
                "batch, kv_heads, chunks of 512 keys behind the first 16, floats of a chunk");
  }
  check_range("total_len", total_len, 0, int64_t{1} << 26);
  check_range("q_len", q.len, 0, INT32_MAX);
  const int64_t count = static_cast<int64_t>(a.num_samples.size());
  if (count != 1 && count != q.heads) {
    fail("num_samples must hold 1 number or one per query head (" + std::to_string(q.heads) + "), got " +
         std::to_string(count));
  }

  QuantumAttentionCall call{};
  call.params = {strategy_of(a),
                 a.num_samples.data(),
                 count,
                 a.control_variate != 0,
                 precision_of(a),
                 a.error_tolerance,
                 residual_of(a),
                 a.is_causal != 0,
                 static_cast<uint32_t>(a.layer),
                 in.seed,
                 a.has_scale ? a.scale : static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.size))),
                 a.softcap > 0.0f ? std::clamp(a.softcap, kLeastCap, kMostCap) : 0.0f,
                 std::min<int64_t>(a.left_window_size, INT32_MAX),  // no more keys are taken
                 std::min<int64_t>(a.right_window_size, INT32_MAX),
                 a.qk_matmul_output_mode,
                 in.q.type,
                 q.batch,
                 q.heads,
                 k.heads,
                 q.len,
                 past_len,
                 k.len,
                 q.size,
                 v.size};
  QuantumAttentionTensors& t = call.tensors;
  t.q = q.rows, t.k = k.rows, t.v = v.rows;
  t.past_key = {in.past_key.data, k.heads * past_len * k.size, past_len * k.size, k.size};
  t.past_value = {in.past_value.data, k.heads * past_len * v.size, past_len * v.size, v.size};
  t.mask = mask_view(in.attn_mask, q.batch, q.heads, q.len, total_len);
  t.nonpad_kv_seqlen = in.nonpad_kv_seqlen;
  if (in.q.shape.rank == 4) {
    call.y = {4, {q.batch, q.heads, q.len, v.size}};
    t.y_batch_stride = q.heads * q.len * v.size, t.y_head_stride = q.len * v.size, t.y_row_stride = v.size;
  } else {
    call.y = {3, {q.batch, q.len, q.heads * v.size, 0}};
    t.y_batch_stride = q.len * q.heads * v.size, t.y_head_stride = v.size, t.y_row_stride = q.heads * v.size;
  }
  call.present_key = {4, {q.batch, k.heads, total_len, k.size}};
  call.present_value = {4, {q.batch, k.heads, total_len, v.size}};
  call.qk_matmul_output = {4, {q.batch, q.heads, q.len, total_len}};
  call.error_estimate = {2, {q.batch, q.heads}};
  call.key_summary = summary;
  t.key_summary = static_cast<const float*>(in.key_summary.data);
  return call;
}

}  // namespace qexport
