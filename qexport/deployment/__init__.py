"""A deployment: what a device needs to run a bundle's model, and to prove that it runs it right.

A bundle, which `convert` writes, is for working with: it holds the classical model and what was found about the converted
one. A deployment is packed from it for one kind of machine, which needs neither qexport nor Python: the model, the op
library built for that machine, samples with the outputs that this model gave, a Python and a C++ program that reproduce
them, and the sha256 of every file.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

import numpy as np

from qexport import installed, runtime
from qexport.arguments import as_path
from qexport.bundle import MANIFEST, MODEL, SEAL, Bundle, Kind, is_changed, own_files, read_manifest, seal_text
from qexport.bundle_writer import write_bundle
from qexport.data import stored_samples
from qexport.deployment.library import LIBRARY, check_target, copy_library, this_target
from qexport.documents import make_document
from qexport.errors import QexportError, UsageError
from qexport.external_data import external_files, load_structure
from qexport.failures import one_line
from qexport.manifest import package_version
from qexport.progress import listener
from qexport.providers import SHORT, uses_tf32
from qexport.validation.limits import DEFAULT_MAX_ERROR, limits_of
from qexport.validation.sensitivity import quantizes, sensitivity

PROVIDERS = ("cpu", "cuda")  # short names; those that run.py knows
SAMPLES = "samples"
CPP = "cpp"  # of the deployment
DEPLOYMENT = Kind(
    "deployment",
    "qexport bundle DIR -o OUT",
    "pack it again",
    {
        "files": dict,
        "target": str,
        "provider": str,
        "min_onnxruntime": str,
        "source": (dict, NoneType),
        "qexport_version": str,
    },
    sealed=True,
)


@dataclass
class VerificationReport:
    """What `verify_deployment` found; that all files are as they were packed is certain, or it would have raised.

    Attributes:
        path: the folder.
        target, provider: what it was packed for.
        files: how many files were compared.
        manifest_sha256: of the manifest; whoever holds it from elsewhere knows that nothing was exchanged.
        run: what `run.py --json` prints; None where this machine is not the target, so that nothing was run.
        passed: False where the outputs are out of tolerance.
    """

    path: str
    target: str
    provider: str
    files: int
    manifest_sha256: str
    run: dict | None = field(default=None)

    @property
    def passed(self) -> bool:
        return self.run is None or self.run["passed"]

    def to_dict(self) -> dict:
        """The report as plain data; figures that are not finite are None."""
        return make_document("verify-bundle", self.__dict__ | {"passed": self.passed})


def pack_deployment(
    bundle, output, *, target: str | None = None, provider: str = "cpu", library=None, progress=None
) -> dict:
    """Pack what a device needs of a bundle into the folder `output`; a deployment that is there is replaced.

    The stored outputs are those of the converted model with its default seed on this machine's CPU, where `target` is this
    machine with the very library that is packed.

    Args:
        bundle: a folder, or a `Bundle`.
        output: the folder of the deployment.
        target: "linux-x86_64" or "linux-aarch64"; this machine when None.
        provider: "cpu" (or its full name), or "cuda" to pack the CUDA kernels too and run there.
        library: a wheel of qexport or an op library for `target`; the installed one when None.
        progress: called with the step in words and the share that is done, 0 to 1.

    Returns:
        The manifest of the deployment.

    Raises:
        UsageError: an unknown target or provider, a target that the installed library is not for, or `output` holds
            something else.
        QexportError: the bundle changed, the library does not fit the target, or the model does not run.
    """
    provider = next((short for short in PROVIDERS if provider in (short, SHORT[short])), provider)
    if provider not in PROVIDERS:
        raise UsageError(f"provider must be {' or '.join(PROVIDERS)}, got {provider!r}")
    target, say = check_target(target), listener(progress)
    say("checking the bundle", 0.0)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, verify=True)
    with write_bundle(output, DEPLOYMENT) as writer:
        folder = writer.path
        structure = load_structure(opened.model_path)
        say("copying the model", 0.2)
        for name in (MODEL, *external_files(structure)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(opened.path / name, folder / name)
        (folder / "lib").mkdir()
        copy_library(folder / "lib", target, provider, library)
        own = folder / "lib" / LIBRARY if target == this_target() else True
        say("running the samples", 0.4)
        _write_samples(opened, folder / SAMPLES, own, provider)
        say("hashing the files", 0.8)
        shutil.copyfile(Path(__file__).with_name("run.py"), folder / "run.py")
        shutil.copytree(_cpp_sources(), folder / CPP)
        writer.manifest = {
            "qexport_version": package_version("qexport"),
            "target": target,
            "provider": provider,
            "min_onnxruntime": opened.manifest["min_onnxruntime"],
            "source": opened.manifest.get("source"),
            "recipe": opened.manifest.get("recipe"),
            "packed_with": {"onnxruntime": installed.onnxruntime().__version__},
        }
    return read_manifest(output, DEPLOYMENT)


def _cpp_sources() -> Path:
    sources = installed.find_installed("deployment/cpp")
    if sources is None:
        raise QexportError("the C++ runner is not in this installation of qexport; install the package")
    return sources


def _write_samples(bundle: Bundle, folder: Path, library, provider: str) -> None:
    """Write input_K.npy and output_K.npy, by the order of the session, and tolerance.npy."""
    inputs = stored_samples(bundle)
    (feed,) = inputs.feeds
    session = runtime.session(bundle.model_path, library=library)
    outputs = runtime.run(session, None, feed)
    arrays = {f"input_{k}": feed[spec.name] for k, spec in enumerate(session.get_inputs())}
    arrays |= {f"output_{k}": value for k, value in enumerate(outputs)}
    arrays["tolerance"] = np.array(_tolerance(bundle, inputs, outputs, provider))
    folder.mkdir()
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise QexportError(f"{bundle.path}: {name} is of type {array.dtype}, which .npy files cannot hold")
        np.save(folder / f"{name}.npy", np.asarray(array, order="C"))


def _tolerance(bundle: Bundle, inputs, outputs, provider: str) -> float:
    """The relative error that another machine may make at the same seed: what the recipe allows, since a processor may
    choose another way to compute an attention; draws are the same everywhere, so noise has no licence of its own."""
    moved = None
    if quantizes(load_structure(bundle.classical_path)):
        moved = sensitivity(bundle, inputs, bundle.manifest["sites"])
    dtypes = [str(value.dtype) for value in outputs]
    limit = limits_of(bundle, dtypes, moved, None, True, tf32=uses_tf32(provider))["library"]
    return limit if np.isfinite(limit) else DEFAULT_MAX_ERROR


def verify_deployment(path, *, runs: int = 20, progress=None) -> VerificationReport:
    """Check that every file of a deployment is as it was packed, and that its model gives the stored outputs here.

    Args:
        path: the folder.
        runs: timed runs of the model.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        QexportError: not a deployment; a file changed, is missing or was added (the message names it); or the model cannot
            be run.
    """
    path, say = as_path("path", path), listener(progress)
    if path.is_file():
        raise QexportError(f"{path}: a file, not a deployment; give the folder that '{DEPLOYMENT.command}' wrote")
    if not path.is_dir():
        raise QexportError(f"{path}: no such folder; pack a deployment with '{DEPLOYMENT.command}'")
    if (path / MANIFEST).is_file() and (path / SEAL).is_file() and _read(path / SEAL) != seal_text(path):
        raise QexportError(f"{path}: {MANIFEST} or {SEAL} changed since it was packed; {DEPLOYMENT.again}")
    manifest = read_manifest(path, DEPLOYMENT)
    say("hashing the files", 0.0)
    if found := _differences(path, manifest):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise QexportError(f"{path}: {found[0]}{more}; copy the whole folder again, or {DEPLOYMENT.again}")
    report = VerificationReport(
        str(path), manifest["target"], manifest["provider"], len(manifest["files"]), seal_text(path).split()[0]
    )
    if manifest["target"] == this_target():
        say("running the samples", 0.5)
        report.run = _run(path, runs)
    return report


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _differences(path: Path, manifest: dict) -> list[str]:
    """What is not as the manifest says, a phrase each."""
    listed = set(manifest["files"]) | own_files(DEPLOYMENT)
    # a link is a file of another place, which may change without this folder
    present = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    found = [f"{name} is missing" for name in sorted(listed - set(present))]
    found += [f"{name} is a link, not a file" for name in sorted(listed & set(present)) if present[name].is_symlink()]
    for name, entry in manifest["files"].items():
        if (file := present.get(name)) and not file.is_symlink() and is_changed(file, entry):
            found.append(f"{name} changed since it was packed")
    return found + [f"{name} was added since it was packed" for name in sorted(set(present) - listed)]


def _run(path: Path, runs: int) -> dict:
    """What the deployment's run.py finds, by the same program of this package."""
    installed.onnxruntime()  # says in one line what is wrong with it
    from qexport.deployment import run

    try:
        return run.check(path, runs=runs)
    except Exception as error:  # onnxruntime raises a dozen types, all straight from Exception
        raise QexportError(f"{path}: cannot be run here: {one_line(error)}") from error
