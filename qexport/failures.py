"""What onnxruntime says when something fails, as one line for the user."""

import os
import re

from qexport.errors import QexportError


def one_line(message, limit: int = 300) -> str:
    """A message on one line, cut off at `limit` characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def explain_run_error(error: Exception) -> QexportError:
    """A failure of a running model as one line."""
    message = _bare(str(error))
    if match := re.search(r"while running (\S+) node\. Name:'(.*?)' Status Message: (.*)", message, flags=re.S):
        name = f"node {match[2]!r} ({match[1]})" if match[2] else f"a node {match[1]} of a fallback"
        return QexportError(f"{name} failed: {one_line(_bare(match[3]))}")
    return QexportError(f"the model does not run: {one_line(message)}")


def explain_load_error(path, error: Exception, runtime: str, library: bool) -> QexportError:
    """A failure of `runtime` (name and version) to load `path` as one line: what is wrong, where, and what to do."""
    return QexportError(f"{path}: {_load_failure(path, str(error), runtime, library)}")


def _load_failure(path, message: str, runtime: str, library: bool) -> str:
    if "Protobuf parsing failed" in message or "No graph was found" in message or "does not have a graph" in message:
        size = os.path.getsize(path)
        return f"not an ONNX model, or cut short ({size} bytes); copy or convert it again"
    if match := re.search(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)", message):
        return f"IR version {match[1]} is newer than {runtime} reads ({match[2]}); upgrade it or write IR 10"
    if match := re.search(r"Opset (\d+) is under development", message):
        return f"opset {match[1]} is newer than {runtime} knows; upgrade it, or export or convert the model at a lower opset"
    if match := re.search(r"Fatal error: (\S+?):(\w+)\(-?\d+\) is not a registered function/op", message):
        domain, op = match[1], match[2]
        if domain == "com.qexport" and not library:
            return f"op {domain}:{op} has no fallback function in the file; load it with the op library"
        return f"op {domain}:{op} is unknown to {runtime}; register the library that holds it or convert it away"
    if match := re.search(r"No Op registered for (\w+) with domain_version of (\d+)", message):
        return f"op {match[1]} of opset {match[2]} is unknown to {runtime}; upgrade it or lower the --opset"
    if match := re.search(r"Could not find an implementation for (\w+)\((\d+)\)", message):
        return (
            f"{runtime} has no kernel here for {match[1]} of opset {match[2]} in the types of the model; "
            "where they are bfloat16, run it with --provider cuda or convert with --dtype float32"
        )
    if match := re.search(r"Please load external data into raw data for tensor: (\S+)", message):
        return (
            f"{runtime} needs {match[1]!r} to compute shapes, but it is stored outside the file; keep small tensors inside"
        )
    if "External data path" in message or "external data" in message.lower() or "External initializer" in message:
        return f"its external data is missing, cut short or outside its folder: {one_line(_bare(message))}"
    if "fallback to CPU EP has been explicitly disabled" in message:
        return "a node has no kernel there, and may run on the CPU only with allow_fallback=True (--allow-fallback)"
    if "cannot get file size" in message or "cannot open file" in message.lower():
        return f"a file it needs cannot be read: {one_line(_bare(message))}"
    return f"{runtime} cannot load it: {one_line(_bare(message))}"


def _bare(message: str) -> str:
    """An onnxruntime message without its code, source file and C++ signature."""
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message)
    message = re.sub(r"Load model from .*? failed:", "", message)
    return re.sub(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)? (?=\w)", "", message, flags=re.S)
