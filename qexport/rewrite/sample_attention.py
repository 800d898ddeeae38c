"""sample_attention: every ai.onnx Attention becomes a QuantumAttention with the same output value.

    Attention(Q, K, V, mask, past_key, past_value, nonpad) -> QuantumAttention(..., seed)

The classical body is attached as a model-local function afterwards (`attach_fallback`), because optimizers drop functions.
"""

import itertools
import json

import numpy as np
import onnx_ir as ir

from qexport.ops import DOMAIN, QUANTUM_ATTENTION, VERSION
from qexport.ops.proto import FALLBACK_KEY, function_proto, make_node
from qexport.recipe import SAMPLING, Recipe
from qexport.rewrite import DeclinedError, LeftAlone, Site
from qexport.rewrite.graph import attribute, is_op
from qexport.rewrite.sizes import known_size

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


def sample_attention(model: ir.Model, recipe: Recipe) -> tuple[list[Site], list[LeftAlone]]:
    """Replace every Attention of `model` in place.

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
            chosen.append(node)
        except DeclinedError as reason:
            left_alone.append(LeftAlone(node.name or "", module_of(node), str(reason)))
    if not chosen:
        return [], left_alone
    recipe.check_matches([(module_of(node), node.name or "") for node in chosen])
    seeds = {own["seed"] for node in chosen if "seed" in (own := sampled_as(node))}
    seed = add_seed(model, min(seeds) if seeds and "seed" not in recipe.model_fields_set else recipe.seed)
    n_outputs = max(len(node.outputs) for node in chosen)
    places = enumerate(zip(chosen, _layers(chosen), strict=True))
    sites = [_replace(node, number, layer, recipe, seed, n_outputs) for number, (node, layer) in places]
    model.graph.opset_imports[DOMAIN] = VERSION
    return sites, left_alone


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


def add_seed(model: ir.Model, default: int) -> ir.Value:
    """A scalar int64 graph input with a default value, named seed (or qexport_seed when that name is taken)."""
    taken = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    taken |= {value.name for node in model.graph.all_nodes() for value in node.outputs}
    name = next(n for n in ("seed", "qexport_seed", *(f"qexport_seed_{i}" for i in range(len(taken)))) if n not in taken)
    tensor = ir.tensor(np.asarray(default, np.int64), name=name)
    seed = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]), const_value=tensor)
    model.graph.inputs.append(seed)
    model.graph.register_initializer(seed)
    return seed


def _replace(node: ir.Node, number: int, layer: int, recipe: Recipe, seed: ir.Value, n_outputs: int) -> Site:
    module, name = module_of(node), node.name or f"attention_{number}"
    q_heads, kv_heads, head_size = heads_of(node)
    own = sampled_as(node)
    sampling = recipe.resolve(module, name, q_heads, {key: own[key] for key in SAMPLING if key in own})
    copied = {key: attribute(node, key) for key in COPIED if key in node.attributes}
    proto = make_node("QuantumAttention", ["Q", "K", "V"], ["Y"], layer=layer, **sampling, **copied)
    inputs = [*node.inputs, *[None] * (_SEED_INDEX - len(node.inputs)), seed]
    outputs = list(node.outputs)
    # every node has the outputs of the one function; a blank one would be dropped when the file is written
    unused = [f"{outputs[0].name}/qexport_unused_{i}" for i in range(len(outputs), n_outputs)]
    fresh = [ir.Value() for _ in outputs] + [ir.Value(name=name) for name in unused]
    new = ir.Node(
        DOMAIN,
        "QuantumAttention",
        inputs,
        [ir.serde.deserialize_attribute(a) for a in proto.attribute],
        outputs=fresh,
        name=name,
        metadata_props={FALLBACK_KEY: QUANTUM_ATTENTION.fallback} | ({"qexport.module": module} if module else {}),
    )
    take_over(node, new)
    return Site(
        name=name,
        layer=number,
        module=module,
        **sampling | {"num_samples": list(sampling["num_samples"])},
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_size=head_size,
        output=new.outputs[0].name,
        node=new,
    )


def take_over(node: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `node`: its outputs get the names, types and uses of the old ones."""
    graph = node.graph
    graph.insert_before(node, new)
    for old, value in zip(node.outputs, new.outputs, strict=False):
        name, value.type, value.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name = f"{name}_replaced" if name else name
        value.name = name
    graph.remove(node, safe=True)


def attach_fallback(model: ir.Model, sites: list[Site]) -> None:
    """Attach the classical body of QuantumAttention to a model that holds sites; call it after every other pass."""
    if sites:
        proto = function_proto("QuantumAttention", model.opset_imports[""], len(sites[0].node.outputs))
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
