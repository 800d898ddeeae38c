"""Times of a probe's trials on a device, where onnxruntime's trace has how long a node's kernels take to queue, not to run.

Each trial becomes a model of its node alone, on what the probe gives it; a call ends when the device has done its work. What
a call costs beside its kernel is in every time alike, so times of settings compare.
"""

from collections import defaultdict

import numpy as np
import onnx
from onnx import helper

from qexport.ops.proto import set_attributes
from qexport.profiling.calls import make_call
from qexport.profiling.timing import interleaved
from qexport.runtime import quiet_options
from qexport.validation.probes import open_probe

CALLS, WARMUP = 25, 5
READ = "__qexport_read"


def expose(model: onnx.ModelProto, names: list[str]) -> dict[str, str]:
    """Make all that the nodes `names` read outputs of the model: the output by the name of the value.

    By copies, since a value may be an input of the model, or a weight.
    """
    chosen = set(names)
    values = dict.fromkeys(name for node in model.graph.node if node.name in chosen for name in node.input if name)
    exposed = {name: name + READ for name in values}
    model.graph.node.extend(helper.make_node("Identity", [name], [output]) for name, output in exposed.items())
    model.graph.output.extend(onnx.ValueInfoProto(name=output) for output in exposed.values())
    return exposed


def node_seconds(
    model: onnx.ModelProto, path, names: list[str], values: dict[str, np.ndarray], threads: int | None, where: dict, tell
) -> dict[str, float]:
    """Seconds of each node of `names`, the least of CALLS calls; one session is open at a time.

    Args:
        model: that the nodes belong to; `path` is for messages.
        values: arrays of what they read.
        where: the arguments `providers` and `allow_fallback` of the sessions.
        tell: called with the share that is done.
    """
    chosen, alike = set(names), defaultdict(list)
    for node in model.graph.node:
        if node.name in chosen:
            read = [values[name] for name in node.input if name]
            alike[_alone(model, node, read).SerializeToString(deterministic=True)].append((node.name, read))
    found = {}
    for text, nodes in alike.items():
        options, alone = quiet_options(threads), onnx.load_from_string(text)
        with open_probe(alone, path, library=True, options=options, **where) as session:
            for name, read in nodes:
                feed = dict(zip((value.name for value in alone.graph.input), read, strict=True))
                ms = interleaved({name: make_call(session, feed, [])}, CALLS, warmup=WARMUP)[name]
                found[name] = float(ms.min()) / 1e3
                tell(len(found) / len(names))
    return found


def _alone(model: onnx.ModelProto, node: onnx.NodeProto, read: list[np.ndarray]) -> onnx.ModelProto:
    """A model of the node with its first output, sizes open: the same for nodes that differ in their layer alone."""
    ends = [
        helper.make_tensor_value_info(f"x{i}", helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for i, array in enumerate(read)
    ]
    single = onnx.NodeProto()
    single.CopyFrom(node)
    single.name = "trial"
    set_attributes(single, layer=0)
    numbers = iter(range(len(read)))
    del single.input[:], single.output[:]
    single.input.extend(f"x{next(numbers)}" if name else "" for name in node.input)
    single.output.append("y")
    y = onnx.ValueInfoProto(name="y")
    y.type.tensor_type.elem_type = ends[0].type.tensor_type.elem_type
    graph = helper.make_graph([single], "trial", ends, [y])
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
