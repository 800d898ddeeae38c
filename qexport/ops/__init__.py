"""The op table of the domain `com.qexport`."""

from qexport.ops.quantum_attention import SPEC as QUANTUM_ATTENTION
from qexport.ops.spec import DOMAIN, VERSION, Attr, OpSpec, Param

OPS: tuple[OpSpec, ...] = (QUANTUM_ATTENTION,)

__all__ = ["DOMAIN", "OPS", "QUANTUM_ATTENTION", "VERSION", "Attr", "OpSpec", "Param"]
