// MPSDecode on the CPU: the matrix is the core of all sites merged.
#pragma once

#include "qexport/mps_decode.h"
#include "train_groups.h"

namespace qexport {
namespace QEXPORT_ISA {

// The matrix of one train. Without scratch: the bytes of it that this needs.
template <class Real>
static size_t decode_train(const MpsDecodeParams& p, const void* cores, Real* matrix, char* scratch,
                           const ParallelFor& parallel) {
  const MpsLayout& l = p.layout;
  Arena arena{scratch, 0};
  GroupMaker<Real> maker(l, p.type, cores, arena);
  const Core<Real> shape = shape_of<Real>(l, 0, l.sites);
  const bool direct = shape.r == l.rows && shape.c == l.cols && l.sites > 1;
  const Core<Real> whole = direct ? maker.merge(0, l.sites, matrix, parallel) : maker.make(0, l.sites, parallel);
  if (!scratch) return maker.most();
  if (direct) return 0;
  for (int64_t i = 0; i < l.rows; ++i) std::copy_n(whole.data + i * whole.c, l.cols, matrix + i * l.cols);
  return 0;
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
