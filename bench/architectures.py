"""What `convert` takes: a tiny random model of every type of transformers in architectures.toml, converted and compared.

    python -m bench.architectures [--only TYPE ..] [--threads 2] [--resume FILE] [--json FILE]

A model has two layers. It is converted with strategy exact in a process of its own. The bundle is run, with the op library
and without, on inputs of another batch and length than those of the conversion; one text of three is padded by a third. The
`difference` is the largest from torch's eager attention, relative to the largest value of the output.
"""

import json
import os
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from textwrap import shorten

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: a conversion is a thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

import qexport
from bench import common
from qexport.errors import QexportError
from qexport.sources.huggingface import TASKS

FILE = Path(__file__).with_suffix(".toml")
LOADED_ONCE = ["transformers.modeling_utils", "onnxscript.optimizer", "torch.onnx"]  # for all
# Sizes of the compared inputs by axis; sound has samples or frames.
SIZES = {"batch": 3, "sequence": 21, "decoder_sequence": 13, "samples": 12345, "frames": 150}


@dataclass(frozen=True)
class Case:
    """A model type: its kind and task, and the keys in which its tiny configuration differs from the common ones."""

    type: str
    kind: str
    task: str
    keys: dict


def cases(only: list[str] | None = None) -> list[Case]:
    """The model types of the file, or those named; ValueError where a name is not in it."""
    data = tomllib.loads(FILE.read_text())
    found = [
        Case(name, kind, data["task"].get(name, own["task"]), data["keys"].get(name, {}))
        for kind, own in data["kind"].items()
        for name in own["types"]
    ]
    if unknown := set(only or ()) - {case.type for case in found}:
        raise ValueError(f"{', '.join(sorted(unknown))}: not in {FILE.name}")
    return [case for case in found if not only or case.type in only]


def _tiny(cls, own: dict, shared: dict) -> dict:
    """The shared keys that `cls` knows, and its own; for the configurations that it holds as well."""
    default = cls()
    known = {*default.to_dict(), *cls.attribute_map}
    keys = {key: value for key, value in shared.items() if key in known} | own
    for name in cls.sub_configs:
        part, its_own = getattr(default, name, None), own.get(name, {})
        if hasattr(part, "to_dict") and its_own != "default":
            model_type = its_own.get("model_type", part.model_type)
            inner = type(part) if model_type == part.model_type else transformers.CONFIG_MAPPING[model_type]
            keys[name] = _tiny(inner, its_own, shared) | {"model_type": model_type}
    return {key: value for key, value in keys.items() if value != "default"}


def build(case: Case):
    """The model with random weights, in eager attention, and the class of transformers that reads it again."""
    torch.manual_seed(0)
    cls = transformers.CONFIG_MAPPING[case.type]
    config, errors = cls(**_tiny(cls, case.keys, tomllib.loads(FILE.read_text())["tiny"])), []
    for name in TASKS[case.task]:
        auto = getattr(transformers, name)
        try:
            model = auto.from_config(config, attn_implementation="eager").eval()
        except ValueError as error:  # a type that this class does not serve
            errors.append(error)
            continue
        _randomise(model)
        return model, auto
    raise errors[-1]


@torch.no_grad()
def _randomise(model) -> None:
    """Weights at which attention is not flat, and biases, which transformers begins with 0."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape)
        if "A_log" in name or "dt_" in name:  # the decay of a state space, which has a range
            continue
        if weight.ndim > 1:
            fan_in = weight[0].numel() if name.endswith("weight") else 25
            weight.copy_(noise * (0.7 if weight.ndim == 2 and "embed" in name else 1.2 / fan_in**0.5))
        elif "norm" in name.lower() or name.endswith("weight"):
            weight.add_(0.1 * noise)
        else:
            weight.copy_(0.2 * noise)


def _row(case: Case, reason: str = "") -> dict:
    """A row of which nothing is known but why."""
    row = {"type": case.type, "kind": case.kind, "task": case.task, "model": "", "converted": 0, "left_alone": 0}
    return row | {"difference": None, "notes": "", "reason": reason}


def measure(case: Case, work: Path) -> dict:
    """The row of one model type; its model and its bundle are written to `work`."""
    folder, bundle = work / case.type, work / "bundle"
    row, failed = _row(case), "transformers cannot build it"
    try:
        model, auto = build(case)
        model.save_pretrained(folder)
        row["model"], failed = type(model).__name__, "convert raised an error that is none of its own"
        report = qexport.convert(folder, bundle, task=case.task, strategy="exact")
        row |= {"converted": len(report.sites), "left_alone": len(report.left_alone), "notes": "; ".join(report.notes)}
        row["reason"] = "; ".join(dict.fromkeys(site["reason"] for site in report.left_alone))
        failed = "the bundle cannot be compared"
        model = auto.from_pretrained(folder, attn_implementation="eager", dtype="auto").eval()
        row["difference"] = compare(model, bundle, report.manifest)
    except QexportError as error:
        row["reason"] = str(error).replace(f"{folder}: ", "").removeprefix(f"{case.type}: ")
    except Exception as error:
        row["reason"] = f"{failed}: {type(error).__name__}: {error}"
    return row


def compare(model, bundle: Path, manifest: dict) -> float:
    """The largest difference of the bundle's outputs from those of `model`; inf where one is missing."""
    feeds = inputs(manifest)
    for part in model.modules():  # encoders and decoders hold configurations of their own
        if hasattr(config := getattr(part, "config", None), "use_cache"):
            config.use_cache = False
    with torch.no_grad():
        outputs = model(**{name: torch.tensor(value) for name, value in feeds.items()}, return_dict=True)
    expected = {}
    for name, value in outputs.items():
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if torch.is_tensor(leaf)]
        names = [name] if len(leaves) == 1 else [f"{name}_{i}" for i in range(len(leaves))]
        expected |= {name: leaf.double().numpy() for name, leaf in zip(names, leaves, strict=True)}
    worst = 0.0
    for library in (True, False):
        session = qexport.session(bundle, library=library)
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, feeds), strict=True))
        for name, value in expected.items():
            worst = max(worst, _difference(found.get(name), value, feeds.get("attention_mask")))
    return worst


def inputs(manifest: dict) -> dict[str, np.ndarray]:
    """Random inputs of other sizes than those of the conversion; the second text ends in padding."""
    generator = np.random.default_rng(5)
    feeds = {}
    sizes = SIZES | {axis: min(SIZES[axis], limit) for axis, limit in manifest["limits"].items()}
    for spec in manifest["inputs"]:
        shape = [sizes.get(axis, axis) for axis in spec["shape"]]
        if spec["kind"] == "mask":
            value = np.ones(shape)
            if len(shape) == 2:
                value[1:2, shape[1] * 2 // 3 :] = 0
        elif spec["high"]:
            value = generator.integers(3 if spec["kind"] == "token_ids" else 0, spec["high"], shape)
        else:
            value = generator.standard_normal(shape)
        feeds[spec["name"]] = value.astype(spec["dtype"])
    return feeds


def _difference(found: np.ndarray | None, expected: np.ndarray, mask: np.ndarray | None) -> float:
    """Largest difference relative to the largest expected value, of the tokens that are no padding."""
    if found is None or found.shape != expected.shape:
        return np.inf
    if mask is not None and expected.shape[:2] == mask.shape:
        found, expected = found[mask == 1], expected[mask == 1]
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True):
        return np.inf
    span = np.abs(expected[finite]).max(initial=1e-30)
    return float(np.abs(found[finite] - expected[finite]).max(initial=0) / span)


def _child(case: Case, work: Path, answer) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answer.send(measure(case, work))


def watched(case: Case, limit: float) -> dict:
    """The row of `case` from a process of its own, which has `limit` seconds; its end is a row as well."""
    context = get_context("forkserver")
    context.set_forkserver_preload(LOADED_ONCE)
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as work:
        process = context.Process(target=_child, args=(case, Path(work), sender))
        process.start()
        sender.close()
        done = receiver.poll(limit)
        try:
            row = receiver.recv() if done else _row(case, f"not done in {limit:g} s")
        except EOFError:
            process.join()
            row = _row(case, f"the process ended with {process.exitcode}")
        process.join(5 if done else 0)
        process.kill()
        process.join()
    return row | {"reason": shorten(row["reason"], 200, placeholder=" …")}


def measured(chosen: list[Case], threads: int, limit: float, resume: str | None) -> list[dict]:
    """The rows of all cases; those in the file `resume` are taken from it, and the others appended."""
    rows = {}
    if resume and Path(resume).is_file():
        rows = {row["type"]: row for row in map(json.loads, Path(resume).read_text().splitlines())}

    def run(case: Case) -> None:
        began = time.monotonic()
        rows[case.type] = row = watched(case, limit)
        found = f"{row['converted']} converted, {row['left_alone']} left alone"
        print(f"{case.type}: {found} {row['reason']} ({time.monotonic() - began:.0f} s)", flush=True)
        if resume:
            with open(resume, "a") as file:
                file.write(json.dumps(row) + "\n")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [case for case in chosen if case.type not in rows]))
    return [rows[case.type] for case in chosen]


def main():
    parser = common.parser(__doc__.split("\n")[0], threads="conversions at a time, each in a thread", limit=100.0)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="only these model types")
    parser.add_argument("--resume", metavar="FILE", help="take rows from this file, and append the others to it")
    arguments = parser.parse_args()
    try:
        chosen = cases(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "layers": 2}
    rows = measured(chosen, arguments.threads, arguments.limit, arguments.resume)
    common.report("architectures", arguments.threads, versions, {"architectures": rows}, arguments.json)


if __name__ == "__main__":
    main()
