"""How far rounding alone moves a model's outputs: the classical model against itself with its attentions off by two ulps.

A model that quantises its activations as it runs (int8 graphs with DynamicQuantizeLinear) turns the last digit of one value
into a whole quantisation step, and the next layers amplify it. Two correct programs then differ by far more than rounding,
and a comparison has to know by how much.
"""

import numpy as np
import onnx
from onnx import numpy_helper

from qexport import runtime
from qexport.external_data import load_structure
from qexport.validation.probes import open_probe, watch
from qexport.validation.statistics import ErrorAccumulator
from qexport.validation.unpadded import as_floats, keep_masks, padded_axis, rows

QUANTIZERS = {"DynamicQuantizeLinear", "QuantizeLinear"}
PERTURBED = "__qexport_perturbed"
TRIALS = 3  # where the first step flips is chance


def quantizes(model: onnx.ModelProto) -> bool:
    """Whether a model quantises values as it runs, its subgraphs not looked into."""
    return any(node.op_type in QUANTIZERS for node in model.graph.node)


def sensitivity(bundle, inputs, sites: list[dict], providers=None) -> dict[str, float]:
    """Relative change of each graph output when every site's output is multiplied by 1 +- 2 ulp; the largest of TRIALS.

    The signs differ from one feature to the next: a common factor would vanish in the next quantisation.

    Raises:
        QexportError: the model does not load or run.
    """
    watched = watch(bundle.classical_path, sites)
    outputs = [o.name for o in load_structure(bundle.classical_path).graph.output]
    largest = dict.fromkeys(outputs, 0.0)
    with open_probe(watched, bundle.classical_path, library=False, providers=providers) as base:
        names = [o.name for o in base.get_outputs()]
        symbols = {o.name: o.shape for o in base.get_outputs()}
        example = dict(zip(names, runtime.run(base, names, inputs.feeds[0]), strict=True))
        for trial in range(TRIALS):
            nudged = perturb(load_structure(bundle.classical_path), sites, example, trial)
            errors = {name: ErrorAccumulator(1) for name in outputs}
            with open_probe(nudged, bundle.classical_path, library=False, providers=providers) as session:
                for feed in inputs.feeds:
                    masks = keep_masks(bundle.manifest, feed)
                    pairs = zip(runtime.run(base, outputs, feed), runtime.run(session, outputs, feed), strict=True)
                    for name, (before, after) in zip(outputs, pairs, strict=True):
                        padded = padded_axis(before.shape, symbols[name], masks)
                        errors[name].add(*as_floats(rows(before, padded), [rows(after, padded)]))
            largest = {name: max(largest[name], float(errors[name].relative_errors()[0])) for name in outputs}
    return largest


def perturb(model: onnx.ModelProto, sites: list[dict], values: dict[str, np.ndarray], seed: int) -> onnx.ModelProto:
    """The model with each site's output multiplied by a vector of 1 +- 2 ulp along its last axis.

    Args:
        values: an array of each site's output, for its type and last size.
        seed: of the signs.
    """
    rng = np.random.default_rng(seed)
    outputs = {site["output"] for site in sites}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        added = model.graph.node.add()
        added.CopyFrom(node)
        for i, name in enumerate(node.output):
            if name not in outputs:
                continue
            dtype = values[name].dtype
            signs = rng.choice([-1.0, 1.0], values[name].shape[-1])
            factor = (1 + 2 * float(np.finfo(dtype).eps) * signs).astype(dtype)
            model.graph.initializer.append(numpy_helper.from_array(factor, name + PERTURBED + "_by"))
            added.output[i] = name + PERTURBED
            inputs = [name + PERTURBED, name + PERTURBED + "_by"]
            model.graph.node.append(onnx.helper.make_node("Mul", inputs, [name], name=name + PERTURBED))
    return model
