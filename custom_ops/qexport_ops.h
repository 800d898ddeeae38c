// The ops of the domain com.qexport in a program that links libqexport_ops.a, as apps on phones do: docs/packaging.md.
//
// Hand the function to onnxruntime by its name (RegisterCustomOpsUsingFunction), or call it. A name of its own, unlike
// RegisterCustomOps of the shared library, lets it be linked beside other static op libraries.
#pragma once

#include <onnxruntime_c_api.h>

#ifdef __cplusplus
extern "C" {
#endif

// Adds the ops to the sessions made with `options`. `base` is OrtGetApiBase(). Null, or a status that the caller releases:
// the runtime is older than 1.17, or the options have a domain com.qexport already.
#if defined(__GNUC__)
__attribute__((visibility("default"), used))
#endif
OrtStatus* ORT_API_CALL RegisterQexportOps(OrtSessionOptions* options, const OrtApiBase* base);

#ifdef __cplusplus
}
#endif
