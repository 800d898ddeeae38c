"""summarize_cache: attention over a cache gets a summary of it, so that strategy tree need not read all of it in a step.

    QuantumAttention(Q, present_key, present_value, nonpad_kv_seqlen, seed, past_key_values.I.summary)
        -> Y, present.I.summary

The summaries are inputs of both models, so that the same feed suits them, and outputs of the converted one alone: the
classical model reads its whole cache. All attentions have one or none has, since they share one fallback function.
"""

import onnx_ir as ir

from qexport.ops.key_summary import CHUNK_KEYS, SINK_KEYS, chunks, key_summary_shape, paying_length, pays
from qexport.recipe import Recipe
from qexport.rewrite import DeclinedError, Site
from qexport.rewrite.graph import is_op
from qexport.rewrite.sample_attention import heads_of, module_of
from qexport.rewrite.values import size


def add_summaries(model: ir.Model, recipe: Recipe) -> tuple[list[tuple[str, str]], str]:
    """Add the inputs to the classical `model`, whose Attention nodes read caches.

    Returns:
        The names of the inputs and of the outputs to come as (past, present) pairs; or none, and why a step reads the whole
        cache, "" where the recipe wants nothing else.
    """
    nodes = [node for node in model.graph if is_op(node, "Attention")]
    try:
        for layer, node in enumerate(nodes):
            _check(node, layer, recipe)
    except DeclinedError as reason:
        return [], str(reason)
    pairs = []
    for layer, node in enumerate(nodes):
        key, value = node.inputs[1:3]
        shape = key_summary_shape(0, size(key, 1), size(key, 2), size(key, 3), size(value, 3))
        past = ir.Value(name=f"past_key_values.{layer}.summary", type=ir.TensorType(ir.DataType.FLOAT))
        past.shape = ir.Shape([size(key, 0), *shape[1:]])
        model.graph.inputs.append(past)
        pairs.append((past.name, f"present.{layer}.summary"))
    return pairs, ""


def _check(node: ir.Node, layer: int, recipe: Recipe) -> None:
    """Raise DeclinedError where a summary would never be read."""
    sampling = recipe.resolve(module_of(node), node.name or f"attention_{layer}", heads_of(node)[0])
    if sampling["strategy"] != "tree":
        raise DeclinedError("")
    if not pays(size(node.inputs[1], 2), sampling["error_tolerance"]):
        raise DeclinedError(
            f"an error_tolerance of {sampling['error_tolerance']:g} pays from "
            f"{paying_length(sampling['error_tolerance'])} tokens on"
        )
    if node.inputs[3] is not None:
        raise DeclinedError("an attention sees a window of keys only")
    if chunks(size(node.inputs[1], 2)) == 0:
        raise DeclinedError(f"a summary needs {SINK_KEYS + CHUNK_KEYS} tokens")


def summarize_cache(model: ir.Model, sites: list[Site], pairs: list[tuple[str, str]]) -> None:
    """Connect the summaries of `add_summaries` to the QuantumAttention nodes, in place."""
    inputs = {value.name: value for value in model.graph.inputs}
    for site, (past, present) in zip(sites, pairs, strict=True):
        node = site.node
        node.resize_inputs(9)
        node.replace_input_with(8, inputs[past])
        node.resize_outputs(6)
        for value in node.outputs[1:5]:
            value.name = ""  # what nobody asks for is not computed
        output = node.outputs[5]
        output.name, output.type, output.shape = present, inputs[past].type, inputs[past].shape
        model.graph.outputs.append(output)
