// Runs the model of a deployment, the folder that `qexport bundle` packs: feeds it the stored samples, compares what comes
// out with the stored outputs, and times it.
//
//   qexport_runner DIR [--runs N] [--threads N] [--provider cpu|cuda] [--save FOLDER]
//
// Exit codes: 0 the outputs are the stored ones, 1 the model cannot be run, 2 usage, 3 the outputs are out of tolerance.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "npy.h"

namespace {

constexpr int kFailed = 1, kUsage = 2, kOutOfTolerance = 3;
constexpr int kWarmup = 3;
constexpr double kInfinite = std::numeric_limits<double>::infinity();

struct Options {
  std::string folder, provider, save;
  int runs = 20, threads = 0;
};

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

int parse_number(const std::string& name, const std::string& text, int least) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least || value > 1000000) {
    throw UsageError(name + " must be a whole number from " + std::to_string(least) + " to 1000000, got '" + text + "'");
  }
  return static_cast<int>(value);
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      if (!options.folder.empty()) throw UsageError("one folder only, got '" + word + "' too");
      options.folder = word;
      continue;
    }
    if (i + 1 == argc) throw UsageError(word + " takes a value, or is not known");
    const std::string value = argv[++i];
    if (word == "--runs") {
      options.runs = parse_number(word, value, 1);
    } else if (word == "--threads") {
      options.threads = parse_number(word, value, 1);
    } else if (word == "--save") {
      options.save = value;
    } else if (word == "--provider" && (value == "cpu" || value == "cuda")) {
      options.provider = value;
    } else {
      throw UsageError("no option " + word + " " + value);
    }
  }
  if (options.folder.empty()) throw UsageError("DIR is missing, the folder that `qexport bundle` packed");
  return options;
}

bool exists(const std::string& path) { return std::ifstream(path).good(); }

// --- Types: numpy's, onnxruntime's and how an element becomes a double

struct Type {
  const char* name;
  ONNXTensorElementDataType onnx;
  double (*at)(const char* data, size_t i);
};

template <typename T>
double element(const char* data, size_t i) {
  T value;
  std::memcpy(&value, data + i * sizeof(T), sizeof(T));
  return static_cast<double>(value);
}

double half_element(const char* data, size_t i) {
  uint16_t bits;
  std::memcpy(&bits, data + 2 * i, 2);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double value = std::ldexp(exponent ? fraction + 1024 : fraction, std::max(exponent, 1) - 25);
  if (exponent == 31) value = fraction ? std::numeric_limits<double>::quiet_NaN() : kInfinite;
  return bits >> 15 ? -value : value;
}

constexpr Type kTypes[] = {
    {"<f4", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, element<float>},
    {"<f8", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, element<double>},
    {"<f2", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, half_element},
    {"|b1", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, element<uint8_t>},
    {"|i1", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, element<int8_t>},
    {"|u1", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, element<uint8_t>},
    {"<i2", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, element<int16_t>},
    {"<u2", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, element<uint16_t>},
    {"<i4", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, element<int32_t>},
    {"<u4", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, element<uint32_t>},
    {"<i8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, element<int64_t>},
    {"<u8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, element<uint64_t>},
};

const Type& find_type(const std::string& what, const std::function<bool(const Type&)>& fits) {
  const auto found = std::find_if(std::begin(kTypes), std::end(kTypes), fits);
  if (found == std::end(kTypes)) throw std::runtime_error(what + " is of a type that this program does not know");
  return *found;
}

// --- The model

Ort::Session open_session(const Options& options, const Ort::Env& env) {
  const std::string plugin = options.folder + "/lib/libqexport_ops_cuda.so", model = options.folder + "/model.onnx";
  if (!exists(model)) throw std::runtime_error(model + ": cannot be read; DIR is the folder that `qexport bundle` packed");
  Ort::SessionOptions session;
  if (options.threads > 0) session.SetIntraOpNumThreads(options.threads);
  // A deployment for CUDA has the kernels for it, one for the CPU has not.
  if (options.provider == "cuda" || (options.provider.empty() && exists(plugin))) {
    session.AppendExecutionProvider_CUDA(OrtCUDAProviderOptions{});
  }
  session.RegisterCustomOpsLibrary((options.folder + "/lib/libqexport_ops.so").c_str());
  return Ort::Session(env, model.c_str(), session);
}

// The names of the inputs or outputs: `count` and `name` are methods of the session.
template <typename Count, typename Name>
std::vector<std::string> names_of(const Ort::Session& session, Count count, Name name) {
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> names;
  for (size_t k = 0; k < (session.*count)(); ++k) names.emplace_back((session.*name)(k, allocator).get());
  return names;
}

std::vector<const char*> pointers(const std::vector<std::string>& names) {
  std::vector<const char*> result;
  for (const std::string& name : names) result.push_back(name.c_str());
  return result;
}

std::vector<Array> read_arrays(const std::string& folder, const char* kind, size_t count) {
  std::vector<Array> arrays;
  for (size_t k = 0; k < count; ++k) {
    arrays.push_back(read_npy(folder + "/samples/" + kind + "_" + std::to_string(k) + ".npy"));
  }
  return arrays;
}

// A tensor on the memory of the array, which must outlive it.
Ort::Value as_tensor(Array& array, const std::string& name) {
  const Type& type = find_type("input " + name, [&](const Type& t) { return array.type == t.name; });
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor(memory, array.bytes.data(), array.bytes.size(), array.shape.data(), array.shape.size(),
                                  type.onnx);
}

Array as_array(const Ort::Value& value, const std::string& name) {
  if (!value.IsTensor()) throw std::runtime_error("output " + name + " is no tensor");
  const auto info = value.GetTensorTypeAndShapeInfo();
  const Type& type = find_type("output " + name, [&](const Type& t) { return info.GetElementType() == t.onnx; });
  Array array{type.name, info.GetShape(), {}};
  const char* data = static_cast<const char*>(value.GetTensorRawData());
  array.bytes.assign(data, data + info.GetElementCount() * array.item_size());
  return array;
}

// --- What is measured

// |value - stored| / |stored| (Frobenius); infinite where shapes, types or NaNs differ. As in run.py.
double relative_error(const Array& value, const Array& stored) {
  if (value.type != stored.type || value.shape != stored.shape) return kInfinite;
  const Type& type = find_type("output", [&](const Type& t) { return value.type == t.name; });
  double difference = 0, size = 0;
  for (size_t i = 0; i < value.size(); ++i) {
    const double a = type.at(value.bytes.data(), i), b = type.at(stored.bytes.data(), i);
    if (!(a == b || (std::isnan(a) && std::isnan(b)))) difference += (a - b) * (a - b);
    if (std::isfinite(b)) size += b * b;
  }
  if (difference == 0) return 0;
  return size > 0 && std::isfinite(difference) ? std::sqrt(difference / size) : kInfinite;
}

double percentile(std::vector<double> times, double share) {
  std::sort(times.begin(), times.end());
  return times[static_cast<size_t>(share * static_cast<double>(times.size() - 1) + 0.5)];
}

int run(const Options& options) {
  const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!api) {
    throw std::runtime_error(std::string("onnxruntime ") + OrtGetApiBase()->GetVersionString() +
                             " is older than the headers that this program was built with");
  }
  Ort::InitApi(api);
  const Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "qexport_runner");  // what fails is thrown, and would be printed as well
  Ort::Session session = open_session(options, env);

  const auto inputs = names_of(session, &Ort::Session::GetInputCount, &Ort::Session::GetInputNameAllocated);
  const auto outputs = names_of(session, &Ort::Session::GetOutputCount, &Ort::Session::GetOutputNameAllocated);
  std::vector<Array> feed = read_arrays(options.folder, "input", inputs.size());
  const std::vector<Array> stored = read_arrays(options.folder, "output", outputs.size());
  const Array allowed = read_npy(options.folder + "/samples/tolerance.npy");
  if (allowed.type != "<f8" || allowed.size() != 1) throw std::runtime_error("samples/tolerance.npy is not one float64");
  const double tolerance = element<double>(allowed.bytes.data(), 0);

  std::vector<Ort::Value> tensors;
  for (size_t k = 0; k < feed.size(); ++k) tensors.push_back(as_tensor(feed[k], inputs[k]));
  const auto input_names = pointers(inputs), output_names = pointers(outputs);
  const auto call = [&] {
    return session.Run(Ort::RunOptions{}, input_names.data(), tensors.data(), tensors.size(), output_names.data(),
                       output_names.size());
  };

  const std::vector<Ort::Value> found = call();
  if (!options.save.empty()) std::filesystem::create_directories(options.save);
  bool passed = true;
  for (size_t k = 0; k < outputs.size(); ++k) {
    const Array value = as_array(found[k], outputs[k]);
    if (!options.save.empty()) write_npy(options.save + "/output_" + std::to_string(k) + ".npy", value);
    const double error = relative_error(value, stored[k]);
    passed = passed && error <= tolerance;
    std::printf("output %s: relative error %.2g, allowed %.2g\n", outputs[k].c_str(), error, tolerance);
  }

  std::vector<double> times;
  for (int i = 0; i < kWarmup + options.runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    if (i >= kWarmup) times.push_back(time.count());
  }
  std::printf("latency: p50 %.3f ms, p90 %.3f ms, p99 %.3f ms; %d run%s\n", percentile(times, 0.5), percentile(times, 0.9),
              percentile(times, 0.99), options.runs, options.runs == 1 ? "" : "s");
  std::puts(passed ? "PASSED" : "FAILED: the outputs are not the stored ones");
  return passed ? 0 : kOutOfTolerance;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const UsageError& error) {
    std::fprintf(stderr, "qexport_runner: %s\n", error.what());
    return kUsage;
  } catch (const std::exception& error) {
    std::string line = error.what();
    std::replace(line.begin(), line.end(), '\n', ' ');
    std::fprintf(stderr, "qexport_runner: error: %s\n", line.c_str());
    return kFailed;
  }
}
