// What noise does to each qubit of a register, from the attributes and inputs that QuantumNoise and QuantumOverlap share.
#pragma once

#include <complex>
#include <string>
#include <vector>

#include "qexport/tensor_view.h"

namespace qexport {

// The attributes of a node, all of them given.
struct NoiseChannelAttributes {
  std::string channel, scope, convention;
};

// Of type f32 or f64.
struct NoiseChannelInputs {
  TensorView level, t1, t2, excited_population, kraus;
};

// A linear map of the elements 00, 01, 10, 11 that the bits of one qubit number in a density matrix.
struct QubitMap {
  std::complex<double> at[4][4];
};

struct NoiseChannel {
  std::vector<QubitMap> maps;  // of each qubit; the identity with scope global
  double uniform;              // share of the whole state that becomes the mixed state: scope global
  double tolerance;            // of what must be exact in the type of the inputs
};

// Kraus operators and unitaries of a type: how far they may be from what they must be.
double exactness(DType type);

// rho -> G rho G^dagger for the 2 x 2 matrix G, row by row.
QubitMap map_of_gate(const std::complex<double> (&gate)[4]);

// First `inner`, then `outer`.
QubitMap composed(const QubitMap& outer, const QubitMap& inner);

// Whether every element is real, as for all channels but Kraus operators.
bool is_real(const std::vector<QubitMap>& maps);

// Element i of a tensor of type f32 or f64.
double number(const TensorView& tensor, int64_t i);

// ceil(log2 n): the qubits of a register with n states in use.
int num_qubits(int64_t n);

// Errors, all std::invalid_argument with one line: "[QuantumNoise] level must be in 0 to 1, got 1.5".
void check_choice(const char* op_name, const char* attribute, const std::string& value,
                  const std::vector<const char*>& choices);
void check_attributes(const char* op_name, const NoiseChannelAttributes& attributes);
NoiseChannel resolve_channel(const char* op_name, const NoiseChannelAttributes& attributes, const NoiseChannelInputs& inputs,
                             int qubits);

}  // namespace qexport
