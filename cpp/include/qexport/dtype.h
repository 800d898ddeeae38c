// Types of tensor elements.
#pragma once

#include <cstdint>

namespace qexport {

enum class DType : int32_t { f32, f16, bf16, boolean, i64, f64 };

}  // namespace qexport
