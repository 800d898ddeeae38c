"""qexport: transformers as one ONNX file with sampled attention.

Importing the package needs neither torch nor onnx; the functions below import what they need when they are first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("qexport")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "Generator": "qexport.generation",
    "compare": "qexport.comparison",
    "compress": "qexport.compression",
    "convert": "qexport.conversion",
    "get_library_path": "qexport.installed",
    "inspect": "qexport.inspection",
    "map_attention": "qexport.attention",
    "measure_resilience": "qexport.resilience",
    "pack_deployment": "qexport.deployment",
    "profile": "qexport.profiling",
    "report": "qexport.reporting",
    "session": "qexport.runtime",
    "sweep": "qexport.scaling",
    "tune": "qexport.tuning",
    "validate": "qexport.validation",
    "verify_deployment": "qexport.deployment",
    "QexportError": "qexport.errors",
    "UsageError": "qexport.errors",
}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qexport' has no attribute {name!r}")
