"""sample_attention: every ai.onnx Attention becomes a QuantumAttention with the same output value.

    Attention(Q, K, V, mask, past_key, past_value, nonpad) -> QuantumAttention(..., seed)

Where the recipe has noise, QuantumAttention gives the exact probabilities and `measure_attention` goes on from there. The
classical bodies are attached as model-local functions afterwards (`attach_fallback`), because optimizers drop functions.
"""

import itertools
import json

import numpy as np
import onnx_ir as ir

from qexport.ops import DOMAIN, OPS, QUANTUM_ATTENTION, VERSION
from qexport.ops.proto import FALLBACK_KEY, function_proto, make_node
from qexport.recipe import NOISE, SAMPLING, Recipe
from qexport.rewrite import DeclinedError, LeftAlone, Site
from qexport.rewrite.graph import Builder, attribute, is_op
from qexport.rewrite.measure_attention import PROBABILITIES_MODE, PROBABILITY_OUTPUTS, Levels, check_noise, measured_output
from qexport.rewrite.values import known_size

COPIED = (
    "is_causal",
    "kv_num_heads",
    "left_window_size",
    "q_num_heads",
    "qk_matmul_output_mode",
    "right_window_size",
    "scale",
    "softcap",
    "softmax_precision",
)
# Metadata of an Attention that a module of qexport.nn exported: how it samples, its layer and its seed, as JSON.
SAMPLED_AS = "qexport.sampled_as"
_SAMPLED_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SEED_INDEX = [param.name for param in QUANTUM_ATTENTION.inputs].index("seed")


def sample_attention(model: ir.Model, recipe: Recipe, *, invert: bool = False) -> tuple[list[Site], list[LeftAlone]]:
    """Replace every Attention of `model` in place.

    Args:
        invert: take the noise of the recipe off what was measured, as `measured_output` says.

    Returns:
        The sites in graph order, and the Attention nodes that stay with the reason.

    Raises:
        UsageError: the recipe does not fit the model.
    """
    nodes = [node for node in model.graph.all_nodes() if is_op(node, "Attention")]
    left_alone, chosen = [], []
    for node in nodes:
        try:
            check(node)
            sampling = _sampling(node, len(chosen), recipe)
            if "noise" in sampling:
                check_noise(node)
            chosen.append((node, sampling))
        except DeclinedError as reason:
            left_alone.append(LeftAlone(node.name or "", module_of(node), str(reason)))
    if not chosen:
        return [], left_alone
    recipe.check_matches([(module_of(node), node.name or "") for node, _ in chosen])
    noisy = any("noise" in sampling for _, sampling in chosen)
    levels = Levels(model, add_input(model, "noise_scale", np.asarray(1, np.float32))) if noisy else None
    seeds = {own["seed"] for node, _ in chosen if "seed" in (own := sampled_as(node))}
    default = min(seeds) if seeds and "seed" not in recipe.model_fields_set else recipe.seed
    seed = add_input(model, "seed", np.asarray(default, np.int64))
    n_outputs = max(PROBABILITY_OUTPUTS if "noise" in sampling else len(node.outputs) for node, sampling in chosen)
    layers = _layers([node for node, _ in chosen])
    sites = [
        _replace(node, number, layer, sampling, seed, levels, n_outputs, invert)
        for number, ((node, sampling), layer) in enumerate(zip(chosen, layers, strict=True))
    ]
    model.graph.opset_imports[DOMAIN] = VERSION
    return sites, left_alone


def _sampling(node: ir.Node, number: int, recipe: Recipe) -> dict:
    """How the attention of this number among the sites is computed: what `Recipe.resolve` says."""
    own = sampled_as(node)
    name = _name_of(node, number)
    return recipe.resolve(module_of(node), name, heads_of(node)[0], {key: own[key] for key in SAMPLING if key in own})


def _name_of(node: ir.Node, number: int) -> str:
    return node.name or f"attention_{number}"


def _layers(nodes: list[ir.Node]) -> list[int]:
    """The layer that each site draws as: the one that its module brought along, else the next that no module has."""
    own = [sampled_as(node).get("layer") for node in nodes]
    free = (layer for layer in itertools.count() if layer not in own)
    return [next(free) if layer is None else layer for layer in own]


def check(node: ir.Node) -> None:
    """Raise DeclinedError, with the reason, for an Attention that QuantumAttention cannot stand in for."""
    dtype = node.inputs[0].dtype
    if dtype is not None and dtype not in _SAMPLED_TYPES:
        raise DeclinedError(f"its type is {dtype.name.lower()}; QuantumAttention takes float32, float16 and bfloat16")


def module_of(node: ir.Node) -> str:
    """The torch module that a node came from, "" when unknown."""
    return node.metadata_props.get("qexport.module", "")


def sampled_as(node: ir.Node) -> dict:
    """How the module that a node came from samples by itself: SAMPLING, layer and, when known, seed; empty for others."""
    return json.loads(node.metadata_props.get(SAMPLED_AS, "{}"))


def heads_of(node: ir.Node) -> tuple[int | None, int | None, int | None]:
    """(q_heads, kv_heads, head_size) of an attention node, each None when the graph does not tell it."""
    q, k = node.inputs[0], node.inputs[1]
    q_heads, kv_heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
    if q_heads:
        width = known_size(q, 2)
        return q_heads, kv_heads, width // q_heads if width else None
    head_size = known_size(q, 3) or known_size(k, 3)
    return known_size(q, 1) or known_size(node.outputs[0], 1), known_size(k, 1), head_size


def add_input(model: ir.Model, stem: str, default: np.ndarray) -> ir.Value:
    """A graph input with a default value, of this name (or behind qexport_ when that name is taken)."""
    taken = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    taken |= {value.name for node in model.graph.all_nodes() for value in node.outputs}
    names = (stem, f"qexport_{stem}", *(f"qexport_{stem}_{i}" for i in range(len(taken))))
    name = next(n for n in names if n not in taken)
    tensor = ir.tensor(default, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
    model.graph.inputs.append(value)
    model.graph.register_initializer(value)
    return value


def _replace(node: ir.Node, number: int, layer: int, sampling: dict, seed: ir.Value, levels, n_outputs, invert) -> Site:
    module, name = module_of(node), _name_of(node, number)
    q_heads, kv_heads, head_size = heads_of(node)
    noise, shots = (sampling.get(key) for key in NOISE)
    how = {key: sampling[key] for key in SAMPLING}
    copied = {key: attribute(node, key) for key in COPIED if key in node.attributes}
    if noise:
        copied["qk_matmul_output_mode"] = PROBABILITIES_MODE
    proto = make_node("QuantumAttention", ["Q", "K", "V"], ["Y"], layer=layer, **how, **copied)
    inputs = [*node.inputs, *[None] * (_SEED_INDEX - len(node.inputs)), seed]
    # every node has the outputs of the one function; a blank one would be dropped when the file is written
    stem, given = node.outputs[0].name, 0 if noise else len(node.outputs)
    new = ir.Node(
        DOMAIN,
        "QuantumAttention",
        inputs,
        [ir.serde.deserialize_attribute(a) for a in proto.attribute],
        outputs=[ir.Value(name=None if i < given else f"{stem}/qexport_unused_{i}") for i in range(n_outputs)],
        name=name,
        metadata_props={FALLBACK_KEY: QUANTUM_ATTENTION.fallback} | ({"qexport.module": module} if module else {}),
    )
    node.graph.insert_before(node, new)
    if noise:
        builder = Builder(node, f"{stem}/measured")
        output = measured_output(builder, node, new, levels, noise, shots, invert=invert)
        hand_over(node, [output, *new.outputs[1:3]])
    else:
        output = new.outputs[0]
        hand_over(node, new.outputs)
    return Site(
        name=name,
        layer=number,
        module=module,
        **how | {"num_samples": list(how["num_samples"])},
        noise=noise,
        shots=shots,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_size=head_size,
        output=output.name,
        node=new,
    )


def take_over(node: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `node`: its outputs get the names, types and uses of the old ones."""
    node.graph.insert_before(node, new)
    hand_over(node, new.outputs)


def hand_over(node: ir.Node, values) -> None:
    """Give the names, types and uses of a node's outputs to other values, one after the other, and remove the node."""
    for old, value in zip(node.outputs, values, strict=False):
        if not old.name and value.name:
            continue  # nobody asked for it
        name, value.type, value.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name = f"{name}_replaced" if name else name
        value.name = name
    node.graph.remove(node, safe=True)


def attach_fallback(model: ir.Model) -> None:
    """Attach the standard bodies of the ops that a model holds; call it after every other pass."""
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    for spec in OPS:
        own = [node for node in nodes if node.op_type == spec.name]
        if not own or not spec.fallback:
            continue
        count = max(len(node.outputs) for node in own)
        for node in own:
            node.metadata_props.setdefault(FALLBACK_KEY, spec.fallback)
            given = len(node.outputs)
            node.resize_outputs(count)
            for i in range(given, count):  # a blank one would be dropped when the file is written
                node.outputs[i].name = f"{node.outputs[0].name}/qexport_unused_{i}"
        function = ir.serde.deserialize_function(function_proto(spec.name, model.opset_imports[""], count))
        model.functions[function.identifier()] = function
