"""What goes to a target, and what becomes of its answer."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np

import qexport
from qexport.bundle import MANIFEST, Bundle
from qexport.data import load_inputs
from qexport.deployment.library import LIBRARY, MACHINES, PLUGIN, copy_library
from qexport.errors import UsageError
from qexport.external_data import check_external_data
from qexport.progress import listener, portion
from qexport.providers import CUDA, provider_name
from qexport.remote.connection import Connection, Target, connect

OLDEST_PYTHON = [3, 11]
# Of a bundle; the target has a library of its own, and texts become arrays here.
STAY_HERE = ("lib/", "tokenizer/")


def measure_there(report_type, function: str, bundle, target, arguments: dict, *, library=True, data=None, progress=None):
    """Run `qexport.profile` or `qexport.validate` on another machine.

    Args:
        report_type: the dataclass of the report, whose field `target` then says where it was measured.
        function: "profile" or "validate".
        bundle: a folder, or a `Bundle`.
        target: a `Target`, or its URL.
        arguments: of the function, plain data; `providers` by their full names, and `allow_fallback`.
        library: True for the installed op library where the target is of this machine's kind, False for none, or a wheel of
            qexport or a library for the target.
        data: of `validate`; read here.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: a wrong argument or URL.
        QexportError: the bundle, the connection, what is installed there or the function is at fault; one line says which.
    """
    target = target if isinstance(target, Target) else Target(str(target))
    say = listener(progress)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    for path in (opened.model_path, opened.classical_path):
        check_external_data(path)  # runtimes before 1.25 would read whatever file a model names
    feeds = None
    if data is not None:
        feeds = load_inputs(opened, data, batch=arguments.pop("batch"), seq=arguments.pop("seq"))
    say(f"connecting to {target.host}", 0.0)
    with connect(target) as (connection, hello):
        needs_onnx = function == "validate" or arguments.get("memory")
        platform = _check_hello(connection, hello, ["numpy", "onnxruntime", *(["onnx"] if needs_onnx else [])])
        say(f"copying to {target.host}", 0.05)
        with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
            names = _send_library(connection, Path(folder), platform, arguments, library)
        _send_package(connection)
        _send_bundle(connection, opened)
        job = {"function": function, "arguments": arguments, "library": names, "feeds": _send_feeds(connection, feeds)}
        connection.send("job.json", json.dumps(job).encode())
        connection.start(["-m", "qexport.remote.worker"])
        found = _await_report(connection, target, portion(say, 0.2, 1.0))
        return _as_report(connection, report_type, found, {"bundle": str(opened.path), "target": target.url})


def _check_hello(connection: Connection, hello: dict, needed: list[str]) -> str:
    """The platform of the target, after a check that it has the Python packages that are needed."""
    version, missing, platform = hello.get("python"), hello.get("missing"), hello.get("target")
    if not (isinstance(version, list) and isinstance(missing, list) and all(isinstance(n, int) for n in version)):
        raise connection.error("did not say what is installed there")
    if not isinstance(platform, str) or platform not in MACHINES:
        raise connection.error(f"is {platform}; op libraries are for {' and '.join(MACHINES)}")
    if version < OLDEST_PYTHON:
        found = ".".join(map(str, version))
        raise connection.error(
            f"Python {found} is too old, 3.11 is needed; give another with --python, or pack a deployment"
        )
    if absent := [name for name in needed if name in missing]:
        raise connection.error(
            f"{' and '.join(absent)} not installed for {connection.target.python!r}: pip install {' '.join(absent)} there, "
            "or give another Python with --python"
        )
    return platform


def _send_library(connection: Connection, folder: Path, platform: str, arguments: dict, library) -> str | bool:
    """Where the op library will lie there; False for none."""
    if library is False:
        return False
    provider = "cuda" if CUDA in map(provider_name, arguments["providers"]) else "cpu"
    given = None if library is True else library
    copy_library(folder, platform, provider, given, allow_fallback=arguments["allow_fallback"])
    for name in (LIBRARY, PLUGIN):
        if (folder / name).is_file():
            connection.send(f"lib/{name}", folder / name)
    return f"lib/{LIBRARY}"


def _send_package(connection: Connection) -> None:
    """Our own Python files, and the metadata that says their version."""
    package = Path(qexport.__file__).parent
    for file in sorted(package.rglob("*.py")):
        connection.send(f"qexport/{file.relative_to(package).as_posix()}", file)
    version = qexport.__version__
    metadata = f"Metadata-Version: 2.1\nName: qexport\nVersion: {version}\n"
    connection.send(f"qexport-{version}.dist-info/METADATA", metadata.encode())


def _send_bundle(connection: Connection, bundle: Bundle) -> None:
    files = {name: entry for name, entry in bundle.manifest["files"].items() if not name.startswith(STAY_HERE)}
    for name in files:
        connection.send(f"bundle/{name}", bundle.path / name)
    connection.send(f"bundle/{MANIFEST}", json.dumps(bundle.manifest | {"files": files}).encode())


def _send_feeds(connection: Connection, inputs) -> dict | None:
    if inputs is None:
        return None
    for k, feed in enumerate(inputs.feeds):
        packed = io.BytesIO()
        np.savez(packed, **feed)
        connection.send(f"feeds/{k}.npz", packed.getvalue())
    return {"count": len(inputs.feeds), "source": inputs.source, "notes": inputs.notes}


def _await_report(connection: Connection, target: Target, say) -> dict:
    """The report, once the target has removed what it wrote."""
    found, removed = None, False
    for message in connection.messages():
        if "error" in message:
            error = connection.error(message["error"])
            raise UsageError(str(error)) if message.get("usage") is True else error
        if "progress" in message:
            step, done = str(message["progress"])[:100], message.get("done")
            known = isinstance(done, (int, float)) and 0 <= done <= 1
            say(f"{target.host}: {''.join(c for c in step if c.isprintable())}", done if known else 0.0)
        found = message.get("report", found)
        removed = removed or message.get("removed") is True
    if found is None or not removed:
        raise connection.ended()
    return found


def _as_report(connection: Connection, report_type, found, ours: dict):
    """The report as its dataclass; what names files is ours."""
    names = set(report_type.__dataclass_fields__)
    if not isinstance(found, dict) or set(found) - {"schema", "schema_version"} != names:
        raise connection.error("answered something that is no report of this qexport")
    return report_type(**{name: found[name] for name in names} | ours)
