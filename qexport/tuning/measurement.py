"""What each setting costs and errs at each site, from one model that holds them all.

The probe is the classical model with, beside each of its attentions, one QuantumAttention per setting on the same queries,
keys and values. One session of it gives the squared error of every head, summed inside the graph, and, from onnxruntime's
trace, the time of every node: they take turns within each run, so a slow spell meets all alike. On a device, whose kernels
the trace does not see, nodes are timed by themselves (`device_times`).
"""

import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qexport import runtime
from qexport.bundle import Bundle
from qexport.external_data import load_structure
from qexport.feeds import Inputs
from qexport.ops.proto import set_attributes
from qexport.profiling.trace import KERNEL, read_trace
from qexport.providers import CPU, full_names, provider_name
from qexport.tuning.device_times import expose, node_seconds
from qexport.tuning.settings import Setting
from qexport.validation.comparison import seeded_feed
from qexport.validation.probes import LOCAL, beside, open_probe
from qexport.validation.unpadded import keep_masks, padded_axis

TIMED_RUNS = 7


@dataclass
class SiteTable:
    """One site: its settings, the seconds of each, the squared error of each head by feed, (feeds, settings, heads), and the
    squared norm of the classical output by feed."""

    site: dict
    settings: list[Setting]
    times: np.ndarray
    squares: np.ndarray
    norms: np.ndarray

    def errors(self, feeds=slice(None)) -> np.ndarray:
        """Squared error of each head relative to the whole site's squared norm, (settings, heads)."""
        return self.squares[feeds].sum(axis=0) / max(self.norms[feeds].sum(), 1e-300)

    def relative_errors(self, feeds=slice(None)) -> np.ndarray:
        """The relative error of the site under each setting."""
        return np.sqrt(self.errors(feeds).sum(axis=1))


def key_counts(bundle: Bundle, sites: list[dict], feed: dict, providers=None) -> list[int]:
    """How many keys each site has with these inputs, those of a past included."""
    model, local, _ = beside(bundle.classical_path, load_structure(bundle.model_path), sites)
    nodes = {node.output[0]: node for node in model.graph.node if node.name.endswith(LOCAL)}
    names = {}
    for site in sites:
        inputs = nodes[local[site["name"]]].input
        names[site["name"]] = [inputs[i] for i in (1, 4) if len(inputs) > i and inputs[i]]
    for node in nodes.values():
        model.graph.node.remove(node)
    wanted = [name for group in names.values() for name in group]
    shapes = {name: f"{name}__qexport_shape" for name in wanted}
    model.graph.node.extend(helper.make_node("Shape", [name], [shape]) for name, shape in shapes.items())
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=shape) for shape in shapes.values())
    with open_probe(model, bundle.classical_path, library=False, providers=providers) as session:
        found = dict(zip(shapes, runtime.run(session, list(shapes.values()), feed), strict=True))
    # (batch, heads, keys, size) or (batch, keys, heads * size)
    return [sum(int(found[name][-2]) for name in names[site["name"]]) for site in sites]


def measure(
    bundle: Bundle,
    inputs: Inputs,
    timed: dict,
    sites: list[dict],
    settings: list[list[Setting]],
    threads: int | None = None,
    progress=lambda done: None,
    where: dict | None = None,
) -> list[SiteTable]:
    """Errors on all of `inputs` and times on the feed `timed`, of every setting at every site.

    Args:
        settings: of each site.
        progress: called with the share that is done.
        where: the arguments `providers` and `allow_fallback` of all sessions; the CPU when None.
    """
    where = where or {}
    model, trials = build_probe(bundle, sites, settings)
    named = [output.name for output in model.graph.output]
    on_cpu = provider_name(full_names(where.get("providers"))[0]) == CPU
    every = [name for group in trials for name in group]
    exposed = {} if on_cpu else expose(model, every)
    count = len(inputs.feeds)
    squares = [np.zeros((count, len(group), site["q_heads"])) for site, group in zip(sites, settings, strict=True)]
    norms = np.zeros((len(sites), count))
    runs = TIMED_RUNS + 1
    steps = count + runs
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        options = runtime.quiet_options(threads)
        options.enable_profiling = on_cpu
        options.profile_file_prefix = str(Path(folder) / "trace")
        with open_probe(model, bundle.classical_path, library=True, options=options, **where) as session:
            symbols = {output.name: output.shape for output in session.get_outputs()}
            for step, feed in enumerate(inputs.feeds):
                masks = keep_masks(bundle.manifest, feed)
                values = runtime.run(session, named, seeded_feed(feed, bundle.seed_input, step))
                found = dict(zip(named, values, strict=True))
                for s, site in enumerate(sites):
                    padded = padded_axis(found[site["output"]].shape, symbols[site["output"]], masks)
                    norms[s, step] = _by_head(found[_squares(site["output"])], padded).sum()
                    for c, trial in enumerate(trials[s]):
                        squares[s][step, c] = _by_head(found[_squares(trial)], padded)
                progress((step + 1) / steps)
            if on_cpu:
                for run in range(runs):
                    runtime.run(session, named[:1], seeded_feed(timed, bundle.seed_input, run))
                    progress((count + run + 1) / steps)
                seconds = _traced(read_trace(session.end_profiling())[-TIMED_RUNS:])
            else:
                values = runtime.run(session, list(exposed.values()), seeded_feed(timed, bundle.seed_input, 0))
    if not on_cpu:
        read = dict(zip(exposed, values, strict=True))

        def tell(done):
            progress((count + runs * done) / steps)

        seconds = node_seconds(model, bundle.classical_path, every, read, threads, where, tell)
    return [
        SiteTable(
            site,
            group,
            np.array([seconds[trial] for trial in trials[s]]),
            squares[s],
            norms[s],
        )
        for s, (site, group) in enumerate(zip(sites, settings, strict=True))
    ]


def _traced(runs: list[list[dict]]) -> dict[str, float]:
    """The least seconds of each node: what else runs only adds to it."""
    spent = defaultdict(list)
    for run in runs:
        for event in run:
            spent[event["name"].removesuffix(KERNEL)].append(event["dur"] * 1e-6)
    return {name: min(times) for name, times in spent.items()}


def build_probe(bundle: Bundle, sites: list[dict], settings: list[list[Setting]]) -> tuple[onnx.ModelProto, list[list[str]]]:
    """The probe, and for each site the names of its trials in the order of the settings: of the nodes and of their outputs.

    Outputs are, for a site and for each of its trials, `_squares(name)`: the squared norm of each row of the classical
    output, and of the trial's difference from it, (batch, heads, positions).
    """
    model, local, _ = beside(bundle.classical_path, load_structure(bundle.model_path), sites)
    graph = model.graph
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), _squares("axis")))
    nodes = {node.output[0]: node for node in graph.node if node.name.endswith(LOCAL)}
    del graph.output[:]
    trials = []
    for site, group in zip(sites, settings, strict=True):
        source = nodes[local[site["name"]]]
        graph.node.remove(source)
        graph.output.append(onnx.ValueInfoProto(name=site["output"]))
        split = site["q_heads"] if _flat(source) else None
        _add_squares(graph, site["output"], None, split, opset)
        trials.append([])
        for number, setting in enumerate(group):
            node = graph.node.add()
            node.CopyFrom(source)
            node.name = f"{source.name}_{site['layer']}_{number}"  # names of nodes need not be unique, traces need it
            del node.output[:]
            node.output.append(node.name)
            set_attributes(node, **setting.attributes())
            _add_squares(graph, node.name, site["output"], split, opset)
            trials[-1].append(node.name)
    return model, trials


def _flat(node: onnx.NodeProto) -> bool:
    """Whether the node has 3-D inputs, whose heads lie side by side."""
    return any(attribute.name == "q_num_heads" for attribute in node.attribute)


def _squares(name: str) -> str:
    return f"{name}__qexport_squares"


def _add_squares(graph, name: str, minus: str | None, heads: int | None, opset: int) -> None:
    """Add the output `_squares(name)`: sums over the features of (name - minus)^2, in float32. `heads` splits 3-D values."""

    def node(op, inputs, suffix, **attributes):
        graph.node.append(helper.make_node(op, inputs, [f"{name}__qexport_{suffix}"], **attributes))
        return f"{name}__qexport_{suffix}"

    value = node("Cast", [name], "float", to=TensorProto.FLOAT)
    if minus:
        value = node("Sub", [value, node("Cast", [minus], "base", to=TensorProto.FLOAT)], "difference")
    if heads:
        shape = f"{name}__qexport_heads"
        graph.initializer.append(numpy_helper.from_array(np.array([0, 0, heads, -1]), shape))
        value = node("Transpose", [node("Reshape", [value, shape], "split")], "heads_first", perm=[0, 2, 1, 3])
    axes = {"axes": [-1]} if opset < 18 else {}
    inputs = [value] if opset < 18 else [value, _squares("axis")]
    graph.output.append(onnx.ValueInfoProto(name=node("ReduceSumSquare", inputs, "squares", keepdims=0, **axes)))


def _by_head(squares: np.ndarray, padded: tuple[int, np.ndarray] | None) -> np.ndarray:
    """Sums by head of squares of rows (batch, heads, positions); `padded` is of the attention output that they belong to."""
    kept = squares if padded is None else squares * padded[1][:, None, :]
    return kept.sum(axis=(0, 2), dtype=np.float64)
