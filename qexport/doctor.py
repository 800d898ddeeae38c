"""Is this installation whole? One finding per question, with the way to mend it."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata, util

from qexport.errors import QexportError

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """What was looked at, its state (ok, note or broken), what was found, and what to do about it."""

    subject: str
    state: str
    found: str
    mend: str = ""

    def to_dict(self) -> dict:
        """The finding as JSON-ready data."""
        return asdict(self)


def doctor() -> list[Finding]:
    """Look at everything qexport stands on. Never raises: what fails is a finding with state "broken"."""
    findings = [_python(), _runtime()]
    if findings[-1].state != BROKEN:
        findings.append(_library())
        findings += [_kernel()] if findings[-1].state != BROKEN else []
        findings += [_providers(), _cuda()]
    return [*findings, *_extras()]


def _python() -> Finding:
    cores = os.cpu_count()
    return Finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}, {cores} cores")


def _runtime() -> Finding:
    from qexport import installed

    try:
        installed.onnxruntime()
    except QexportError as error:
        found, _, mend = str(error).partition("; ")
        return Finding("onnxruntime", BROKEN, found, mend)
    packages = installed.installed_runtimes()
    return Finding("onnxruntime", OK, ", ".join(f"{name} {version}" for name, version in packages.items()))


def _library() -> Finding:
    from qexport import installed

    path = installed.find_library()
    if path is None:
        return Finding(
            "op library",
            BROKEN,
            f"{installed.library_file_name()} is not installed; models run their classical fallback",
            "install qexport from a wheel, or 'pip install .' in its source tree",
        )
    return Finding("op library", OK, f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


def _kernel() -> Finding:
    try:
        error = kernel_error("CPUExecutionProvider")
    except Exception as failure:  # whatever onnxruntime raises here is the finding
        found = str(failure).splitlines()[0]
        if (start := found.find("QEXPORT_ISA")) >= 0:
            return Finding("kernel", BROKEN, found[start:], "unset QEXPORT_ISA, or set it to one that this processor has")
        return Finding("kernel", BROKEN, found, "reinstall qexport, or use a newer onnxruntime")
    if not error < 1e-5:
        return Finding("kernel", BROKEN, f"QuantumAttention is off by {error:.2g}", "reinstall qexport and report this")
    return Finding("kernel", OK, f"QuantumAttention agrees with numpy to {error:.0e}{_instruction_set()}")


def kernel_error(provider: str) -> float:
    """How far QuantumAttention on a provider is from numpy."""
    import numpy as np
    from onnx import TensorProto, helper

    from qexport import installed, runtime
    from qexport.ops import DOMAIN, VERSION
    from qexport.ops.proto import make_node

    node = make_node("QuantumAttention", ["Q", "K", "V"], ["Y"], num_samples=4)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 4, 8]) for n in ("Q", "K", "V", "Y")]
    graph = helper.make_graph([node], "doctor", ends[:3], ends[3:])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = np.random.default_rng(0).standard_normal((1, 1, 4, 8)).astype(np.float32)
    options = runtime.quiet_options()
    runtime.register_library(options, installed.get_library_path())
    providers = runtime.check_providers([provider])
    session = runtime.create_session("doctor", model.SerializeToString(), options, providers, True)
    got = session.run(None, {"Q": x, "K": x, "V": x})[0]
    weights = np.exp(x @ x.swapaxes(-1, -2) / np.sqrt(8))
    return float(np.abs(got - weights @ x / weights.sum(-1, keepdims=True)).max())


def _instruction_set() -> str:
    try:
        from qexport import _core
    except ImportError:
        return ""
    return f", instruction set {_core.isa()}"


def _providers() -> Finding:
    from qexport import installed

    return Finding("providers", OK, ", ".join(installed.onnxruntime().get_available_providers()))


def _cuda() -> Finding:
    """Whether models run on a GPU here. Broken only where there is one."""
    from qexport import cuda_checks, installed

    library = installed.find_library()
    obstacle = cuda_checks.provider_obstacle() or (library and cuda_checks.plugin_obstacle(library))
    found = ""
    if library and not obstacle:
        obstacle, found = _cuda_kernel(installed.plugin_path(library))
    if not obstacle:
        return Finding("CUDA", OK, found or "onnxruntime can use it")
    return Finding("CUDA", BROKEN if obstacle.gpu else NOTE, f"{obstacle.found}; models run on the CPU", obstacle.mend)


def _cuda_kernel(plugin):
    from qexport import cuda_checks
    from qexport.providers import CUDA

    try:
        error = kernel_error(CUDA)
    except Exception as failure:  # as for the kernel of the CPU
        return cuda_checks.explain_kernel_error(str(failure), plugin), ""
    if not error < 1e-5:
        return cuda_checks.explain_kernel_error(f"QuantumAttention is off by {error:.2g}", plugin), ""
    return None, f"QuantumAttention agrees with numpy to {error:.0e}"


def _extras() -> list[Finding]:
    wanted = {
        "export": ("torch", "transformers", "convert torch models and Hugging Face folders"),
        "text": ("tokenizers", "feed text lines to validate"),
        "plot": ("matplotlib", "draw with --plot, and the pictures of attention"),
        "qiskit": ("qiskit", "qiskit_aer", "measure rows of attention with Qiskit"),
        "pennylane": ("pennylane", "measure rows of attention with PennyLane"),
    }
    findings = []
    for extra, (*packages, purpose) in wanted.items():
        missing = [name for name in packages if util.find_spec(name) is None]
        if missing:
            mend = f"pip install 'qexport[{extra}]'"
            findings.append(Finding(f"[{extra}]", NOTE, f"{', '.join(missing)} not installed; needed to {purpose}", mend))
        else:
            findings.append(Finding(f"[{extra}]", OK, ", ".join(f"{n} {metadata.version(n)}" for n in packages)))
    return findings


def all_well(findings: list[Finding]) -> bool:
    """Whether nothing is broken."""
    return all(finding.state != BROKEN for finding in findings)
