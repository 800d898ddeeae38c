// RegisterCustomOps, the one symbol of libqexport_ops.so: the name that onnxruntime looks for in a library it loads.
#include "qexport_ops.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  return RegisterQexportOps(options, base);
}
