"""Copies of a bundle's models, in memory, whose attention sites can be watched.

Two kinds: a model with the sites' outputs added to its graph outputs (errors as they run through the model), and the
classical model with the sampled attention of each site beside the classical one, on the same queries, keys and values (the
error of a site alone). Either can also give the sites' probabilities, and the sizes that these would have.
"""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx

from qexport.external_data import check_external_data, external_files, load_structure
from qexport.installed import get_library_path, onnxruntime, version_tuple
from qexport.ops import DOMAIN, QUANTUM_ATTENTION
from qexport.runtime import check_kernels, check_providers, create_session, quiet_options, register_library

LOCAL = "__qexport_local"
ESTIMATE = "__qexport_error_estimate"
PROBABILITIES = "__qexport_probabilities"
SIZE = "__qexport_size"
_OUTPUTS = [param.name for param in QUANTUM_ATTENTION.outputs]
_ESTIMATE_INDEX = _OUTPUTS.index("error_estimate")
_INPUTS = {param.name: i for i, param in enumerate(QUANTUM_ATTENTION.inputs)}
# The first onnxruntime that reads external data of a model in memory relative to a given folder.
FOLDER_OPTION_SINCE = (1, 23)


def ordered_sites(model: onnx.ModelProto, sites: list[dict]) -> list[dict]:
    """The sites whose output is a value of the main graph, in the order in which the graph computes them."""
    position = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    found = [site for site in sites if site["output"] in position]
    return sorted(found, key=lambda site: position[site["output"]])


def watch(path, sites: list[dict]) -> onnx.ModelProto:
    """The model at `path`, its external data not read, with the outputs of the sites as graph outputs."""
    model = load_structure(path)
    add_outputs(model, [site["output"] for site in sites])
    return model


def beside(
    classical_path, model: onnx.ModelProto, sites: list[dict]
) -> tuple[onnx.ModelProto, dict[str, str], dict[str, str]]:
    """The classical model with each site's QuantumAttention, and the noise and measurement behind it, beside its classical
    attention, fed with the same values.

    Args:
        model: the converted model.

    Returns:
        The new model, the name of the sampled value by site name, and the name of the op's error estimate for the sites that
        offer one (`tree`). A site is left out when a value that its node reads can only be had from another sampled site.
    """
    classical = load_structure(classical_path)
    makers = {name: node for node in classical.graph.node for name in node.output}
    _add_inputs(classical, model)
    graft = _Graft(classical, model)
    local, estimates = {}, {}
    for site in sites:
        steps = site_nodes(model, site)
        if not steps or site["output"] not in makers:
            continue
        inputs = _classical_inputs(steps[0], makers[site["output"]])
        inside = {name for step in steps for name in step.output if name}
        read = [*inputs, *(name for step in steps[1:] for name in step.input if name not in inside)]
        if not all(graft.bring(name) for name in read):
            continue
        used = {site["output"], *(name for step in steps[1:] for name in step.input)}
        for step in steps:
            node = classical.graph.node.add()
            node.CopyFrom(step)
            node.name = step.name + LOCAL
            names = inputs if step is steps[0] else [name + LOCAL if name in inside else name for name in step.input]
            del node.input[:], node.output[:]
            node.input.extend(names)
            node.output.extend(name + LOCAL if name in used or i == 0 else "" for i, name in enumerate(step.output))
            while not node.output[-1]:
                del node.output[-1]
        local[site["name"]] = site["output"] + LOCAL
        if site["strategy"] == "tree":
            node.output.extend([*[""] * (_ESTIMATE_INDEX - 1), site["output"] + ESTIMATE])
            estimates[site["name"]] = node.output[_ESTIMATE_INDEX]
    watched = [name for site in sites if site["name"] in local for name in (site["output"], local[site["name"]])]
    add_outputs(classical, [*watched, *estimates.values()])
    return classical, local, estimates


def site_nodes(model: onnx.ModelProto, site: dict) -> list[onnx.NodeProto]:
    """The nodes of the converted model that compute a site's output from its queries, keys and values, in the order of the
    graph: its QuantumAttention and, where there is noise, what follows it; none when they lie in a subgraph."""
    steps, reached = [], set()
    for node in model.graph.node:
        is_first = (node.domain, node.op_type, node.name) == (DOMAIN, QUANTUM_ATTENTION.name, site["name"])
        if is_first or reached & set(node.input):
            steps.append(node)
            reached |= set(node.output) - {""}
        if site["output"] in reached:
            break
    needed, found = {site["output"]}, []
    for node in reversed(steps):
        if needed & set(node.output):
            needed |= set(node.input)
            found.append(node)
    return found[::-1]


def add_probabilities(model: onnx.ModelProto, value_of: dict[str, str], heads: list[int] | None) -> dict[str, str]:
    """Make the attention probabilities of sites graph outputs; the names of these values by site name.

    Each site gets a node of strategy `exact` on the same inputs, so that what the site itself gives stays as it is; of a
    noisy one these are the probabilities before its own noise. The functions of the domain go: onnxruntime wants as many
    outputs on each node as they have. It takes the op library then.

    Args:
        model: from `watch` of a converted model, or from `beside`.
        value_of: the output of each site, by site name.
        heads: the query heads to keep, all when None.
    """
    if heads is not None:
        chosen = onnx.numpy_helper.from_array(np.array(heads, np.int64), f"{PROBABILITIES}_heads")
        model.graph.initializer.append(chosen)
    found = {}
    for site, output in value_of.items():
        source, name = _first_node(model, site, output), output + PROBABILITIES
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in source.attribute}
        attributes |= {"strategy": "exact", "precision": "fp32", "error_tolerance": 0.0, "qk_matmul_output_mode": 3}
        everyone = name if heads is None else f"{name}_of_all_heads"
        outputs = [name + "_Y", *[""] * (_OUTPUTS.index("qk_matmul_output") - 1), everyone]
        node = onnx.helper.make_node(source.op_type, source.input[: _INPUTS["seed"]], outputs, name, domain=DOMAIN)
        node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())
        model.graph.node.append(node)
        if heads is not None:
            model.graph.node.append(onnx.helper.make_node("Gather", [everyone, chosen.name], [name], axis=1))
        found[site] = name
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    add_outputs(model, list(found.values()))
    return found


def sized(hybrid: onnx.ModelProto, local: dict[str, str]) -> tuple[onnx.ModelProto, dict[str, dict]]:
    """The model of `beside` without its sampled attention, whose outputs are the sizes of what each site reads.

    Returns:
        The model, and by site name: `Q`, `K` and `past_key` (names of their shapes among the outputs; None where the site
        has no past), `query_sources` and `key_sources` (the graph inputs that Q and K are computed from), `q_num_heads`
        (None with 4-D inputs) and `is_cached` (keys of earlier steps are read).
    """
    model = onnx.ModelProto()
    model.CopyFrom(hybrid)
    rest = [node for node in model.graph.node if not node.name.endswith(LOCAL)]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(rest)
    found, shapes = {}, {}
    makers = {name: node for node in rest for name in node.output}
    inputs = {value.name for value in model.graph.input}
    for site, output in local.items():
        node = _first_node(hybrid, site, output)
        read = {key: node.input[i] if i < len(node.input) else "" for key, i in _INPUTS.items()}
        for name in (read["Q"], read["K"], read["past_key"]):
            if name and name not in shapes:
                shapes[name] = name + SIZE
                model.graph.node.append(onnx.helper.make_node("Shape", [name], [shapes[name]]))
        found[site] = {key: shapes.get(read[key]) for key in ("Q", "K", "past_key")}
        found[site]["query_sources"] = inputs & _ancestors(makers, read["Q"])
        found[site]["key_sources"] = inputs & _ancestors(makers, read["K"])
        found[site]["q_num_heads"] = next((a.i for a in node.attribute if a.name == "q_num_heads"), None)
        found[site]["is_cached"] = bool(read["past_key"] or read["nonpad_kv_seqlen"])
    add_outputs(model, list(shapes.values()))
    return model, found


def _ancestors(makers: dict, name: str) -> set[str]:
    """The values that a value is computed from, itself among them; of what enters by its shape alone, nothing."""
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            if name in makers and makers[name].op_type != "Shape":
                waiting.extend(makers[name].input)
    return found


def _classical_inputs(source, maker) -> list[str]:
    """The inputs of a QuantumAttention node as values of the classical model: those of the Attention that it replaces, else
    those of the same name."""
    names = list(source.input)
    if maker.op_type == "Attention" and maker.domain == "":
        for i in range(min(len(names), 7)):
            names[i] = maker.input[i] if i < len(maker.input) else ""
    return names


def _first_node(model: onnx.ModelProto, site: str, output: str) -> onnx.NodeProto:
    """The QuantumAttention of a site, in the converted model or as `beside` puts it into the classical one."""
    name = site + LOCAL if output.endswith(LOCAL) else site
    return site_nodes(model, {"name": name, "output": output})[0]


class _Graft:
    """Brings values that only the converted model has (a transposed key, say) into the classical one, with the nodes that
    make them from values that both have. Values of one name are the same in both: rewrites give new values new names.
    """

    def __init__(self, classical: onnx.ModelProto, model: onnx.ModelProto):
        self.graph = classical.graph
        self.available = {"", *(v.name for v in classical.graph.input)}
        self.available |= {t.name for t in classical.graph.initializer}
        self.available |= {name for node in classical.graph.node for name in node.output}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.weights = {t.name: t for t in model.graph.initializer}

    def bring(self, name: str) -> bool:
        """Make the value `name` available; False when it hangs on a sampled value, or its weights lie in another file."""
        if name in self.available:
            return True
        weight, maker = self.weights.get(name), self.makers.get(name)
        if weight is not None and weight.data_location != onnx.TensorProto.EXTERNAL:
            self.graph.initializer.append(weight)
        elif maker is not None and maker.domain != DOMAIN and all(self.bring(source) for source in maker.input):
            self.graph.node.append(maker)
        else:
            return False
        self.available |= {name} if weight is not None else set(maker.output)
        return True


def _add_inputs(classical: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """The seed and the scale of the noise with their defaults, and the domain, as in the converted model."""
    present = {value.name for value in classical.graph.input}
    added = [value for value in model.graph.input if value.name not in present]
    names = {value.name for value in added}
    classical.graph.input.extend(added)
    classical.graph.initializer.extend(t for t in model.graph.initializer if t.name in names)
    classical.opset_import.extend(entry for entry in model.opset_import if entry.domain == DOMAIN)


def add_outputs(model: onnx.ModelProto, names: list[str]) -> None:
    """Make values of the main graph outputs of the model."""
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in present)


@contextmanager
def open_probe(model: onnx.ModelProto, path, *, library: bool | str, providers=None, allow_fallback=False, options=None):
    """A session of a model in memory; `path` is the file that it came from, beside which its external data lies.

    Args:
        library, providers, allow_fallback: as in `qexport.session`.
        options: session options to add to; quiet ones when None.

    Raises:
        UsageError, QexportError: onnxruntime cannot load it there.
    """
    ort = onnxruntime()
    options = options or quiet_options()
    providers = check_providers(providers)
    if library is True:
        library = get_library_path()
    if library:
        register_library(options, str(library))
    folder, scratch, source = Path(path).resolve().parent, None, model.SerializeToString()
    files = external_files(model)
    if files:
        check_external_data(path, model)
    try:
        if files and version_tuple(ort.__version__) >= FOLDER_OPTION_SINCE:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        elif files:
            scratch = Path(tempfile.mkdtemp(prefix="qexport-"))
            for location in files:
                (scratch / location).parent.mkdir(parents=True, exist_ok=True)
                (scratch / location).symlink_to(folder / location)
            (scratch / "model.onnx").write_bytes(source)
            source = str(scratch / "model.onnx")
        opened = create_session(path, source, options, providers, bool(library))
        if library:
            check_kernels(library, providers, allow_fallback)
        del model, source  # the session has what it needs of them, which may be all weights
        yield opened
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
