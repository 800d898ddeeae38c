"""Measuring on another machine: the bundle, the op library for it and qexport's own Python files go there over ssh, and what
`profile` or `validate` finds there comes back.

The target needs Python 3.11, numpy and onnxruntime; `validate`, which looks into models, also onnx. Nothing stays there.
`connection.py` is ssh and what is believed of an answer, `measuring.py` what is sent, `agent.py` and `worker.py` run there.
"""

from qexport.remote.connection import Target

__all__ = ["Target"]
