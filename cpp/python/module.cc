// qexport._core: the kernels on numpy arrays and on tensors of a device, one def per op, no maths.
#include "arrays.h"
#include "qexport/philox.h"
#include "qexport/quantum_attention.h"

namespace qexport {
namespace {

// All four words, so that Python sees (word0, word1, word2, word3) as arrays of the broadcast shape of the arguments.
template <int kWord>
uint32_t philox_word(uint32_t key_lo, uint32_t key_hi, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  return philox4x32(key_lo, key_hi, {{c0, c1, c2, c3}}).word[kWord];
}

using Words = py::array_t<uint32_t>;

py::tuple philox(const Words& key_lo, const Words& key_hi, const Words& c0, const Words& c1, const Words& c2,
                 const Words& c3) {
  return py::make_tuple(py::vectorize(philox_word<0>)(key_lo, key_hi, c0, c1, c2, c3),
                        py::vectorize(philox_word<1>)(key_lo, key_hi, c0, c1, c2, c3),
                        py::vectorize(philox_word<2>)(key_lo, key_hi, c0, c1, c2, c3),
                        py::vectorize(philox_word<3>)(key_lo, key_hi, c0, c1, c2, c3));
}

std::vector<std::string> precisions() {
  std::vector<std::string> names{"fp32"};
  if (computes_in(Precision::bf16)) names.push_back("bf16");
  if (computes_in(Precision::int8)) names.push_back("int8");
  return names;
}

}  // namespace
}  // namespace qexport

PYBIND11_MODULE(_core, m) {
  using namespace pybind11::literals;
  m.doc() = "The kernels on numpy arrays, and on tensors in the memory of a device.";
  qexport::define_cuda(m);
  qexport::define_mps(m);
  qexport::define_mps_product(m);
  qexport::define_quantum_attention(m);
  qexport::define_quantum_noise(m);
  qexport::define_quantum_overlap(m);
  qexport::define_trellis(m);
  m.def("philox", &qexport::philox, "key_lo"_a, "key_hi"_a, "c0"_a, "c1"_a, "c2"_a, "c3"_a,
        "The four words of the Philox4x32-10 block of a key and a counter; uint32 arguments that broadcast.");
  m.def("isa", &qexport::isa_name, "The instruction set in use: generic, avx2, avx512, avx512bf16, amx or neon.");
  m.def("precisions", &qexport::precisions, "The precisions in which QuantumAttention has products here: fp32, bf16, int8.");
}
