"""The op table of the domain `com.qexport`."""

from qexport.ops.mpo_linear import SPEC as MPO_LINEAR
from qexport.ops.mps_attention import SPEC as MPS_ATTENTION
from qexport.ops.mps_decode import SPEC as MPS_DECODE
from qexport.ops.mps_encode import SPEC as MPS_ENCODE
from qexport.ops.quantum_attention import SPEC as QUANTUM_ATTENTION
from qexport.ops.quantum_measure import SPEC as QUANTUM_MEASURE
from qexport.ops.quantum_noise import SPEC as QUANTUM_NOISE
from qexport.ops.quantum_overlap import SPEC as QUANTUM_OVERLAP
from qexport.ops.spec import DOMAIN, VERSION, Attr, OpSpec, Param

OPS: tuple[OpSpec, ...] = (
    QUANTUM_ATTENTION,
    QUANTUM_NOISE,
    QUANTUM_MEASURE,
    QUANTUM_OVERLAP,
    MPS_ENCODE,
    MPS_DECODE,
    MPS_ATTENTION,
    MPO_LINEAR,
)

__all__ = [
    "DOMAIN",
    "MPO_LINEAR",
    "MPS_ATTENTION",
    "MPS_DECODE",
    "MPS_ENCODE",
    "OPS",
    "QUANTUM_ATTENTION",
    "QUANTUM_MEASURE",
    "QUANTUM_NOISE",
    "QUANTUM_OVERLAP",
    "VERSION",
    "Attr",
    "OpSpec",
    "Param",
]
