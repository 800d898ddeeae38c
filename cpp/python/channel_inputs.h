// The inputs of a noise channel, which QuantumNoise and QuantumOverlap share.
#pragma once

#include "arrays.h"
#include "qexport/noise_channel.h"

namespace qexport {

// A parameter of a channel, as numbers of double precision.
inline TensorView parameter(py::object& object, const char* op_name, const char* name, int most = 4) {
  if (object.is_none()) return {};
  object = py::module_::import("numpy").attr("asarray")(object, py::str("float64"));
  return view(object, op_name, name, false, most);
}

// Matrices, in single precision where they come in it: they are held to what their type can say.
inline TensorView matrices(py::object& object, const char* op_name, const char* name, int most) {
  if (object.is_none()) return {};
  object = py::module_::import("numpy").attr("asarray")(object);
  if (py::isinstance<py::array_t<float>>(object)) return view(object, op_name, name, false, most);
  return parameter(object, op_name, name, most);
}

inline NoiseChannelInputs channel_inputs(const char* op_name, py::object& level, py::object& T1, py::object& T2,
                                         py::object& excited_population, py::object& kraus) {
  return {parameter(level, op_name, "level"), parameter(T1, op_name, "T1"), parameter(T2, op_name, "T2"),
          parameter(excited_population, op_name, "excited_population"), matrices(kraus, op_name, "kraus", 5)};
}

}  // namespace qexport
