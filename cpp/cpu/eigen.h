// Eigen, in a namespace of its own for each instruction set: its inline functions are compiled once per copy, and the linker
// must not give one copy's to another.
#pragma once

#define QEXPORT_JOIN_(a, b) a##b
#define QEXPORT_JOIN(a, b) QEXPORT_JOIN_(a, b)
#define Eigen QEXPORT_JOIN(qexport_eigen_, QEXPORT_ISA)
#define EIGEN_DONT_PARALLELIZE
#define EIGEN_NO_DEBUG

#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <Eigen/Eigenvalues>
#include <Eigen/QR>
#pragma GCC diagnostic pop

#include <cstdint>

namespace qexport {
namespace QEXPORT_ISA {

// In place of std::vector<T>, whose functions all copies would share.
template <class T>
using Buffer = Eigen::Array<T, Eigen::Dynamic, 1>;

}  // namespace QEXPORT_ISA
}  // namespace qexport
