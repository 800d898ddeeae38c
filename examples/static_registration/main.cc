// Runs a model whose ops are part of this program: no op library is loaded, as on phones, where none may be.
//
//   static_registration MODEL INPUTS OUTPUT
//
// INPUTS holds the values of the model's inputs, float32 of fixed shapes, one after the other; the first output is written
// to OUTPUT in the same form. Exit codes: 0 done, 1 failed, 2 usage.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void run(const char* model, const char* inputs, const char* output) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "static_registration");
  Ort::SessionOptions options;
  options.RegisterCustomOpsUsingFunction("RegisterQexportOps");
  Ort::Session session(env, model, options);

  std::ifstream file(inputs, std::ios::binary);
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<Ort::AllocatedStringPtr> owned;
  std::vector<const char*> names;
  std::vector<Ort::Value> values;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    owned.push_back(session.GetInputNameAllocated(i, allocator));
    names.push_back(owned.back().get());
    const std::vector<int64_t> shape = session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();
    values.push_back(Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size()));
    const size_t bytes = values.back().GetTensorTypeAndShapeInfo().GetElementCount() * sizeof(float);
    file.read(reinterpret_cast<char*>(values.back().GetTensorMutableData<float>()), static_cast<std::streamsize>(bytes));
  }
  if (!file) throw std::runtime_error(std::string(inputs) + " does not hold the model's inputs");

  owned.push_back(session.GetOutputNameAllocated(0, allocator));
  const char* const wanted = owned.back().get();
  const auto found = session.Run(Ort::RunOptions{nullptr}, names.data(), values.data(), values.size(), &wanted, 1);
  const size_t bytes = found[0].GetTensorTypeAndShapeInfo().GetElementCount() * sizeof(float);
  std::ofstream(output, std::ios::binary)
      .write(reinterpret_cast<const char*>(found[0].GetTensorData<float>()), static_cast<std::streamsize>(bytes));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: static_registration MODEL INPUTS OUTPUT\n");
    return 2;
  }
  // Before anything else of the C++ API: the headers may be newer than the runtime, and ask for less than they know.
  Ort::InitApi(OrtGetApiBase()->GetApi(17));
  try {
    run(argv[1], argv[2], argv[3]);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "static_registration: error: %s\n", error.what());
    return 1;
  }
}
