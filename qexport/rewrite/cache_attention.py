"""cache_attention: causal attention over a whole text becomes attention over a cache that grows in place.

    Attention(Q, K, V, causal mask)  ->  present_key   = TensorScatter(past_key, K, past_len)
                                         present_value = TensorScatter(past_value, V, past_len)
                                         Attention(Q, present_key, present_value, nonpad_kv_seqlen; is_causal)

past_len (batch,) is how many tokens a row has in its cache; nonpad_kv_seqlen = past_len + q_len, and query i of a row sees
the keys 0 .. past_len + i. The caches are (batch, kv_heads, length, head_size) however full they are, so a runtime may bind
one buffer as past and present: then nothing of the past is copied. One graph serves a prompt (q_len > 1) and a step.

That a mask is causal is seen by computing it, not by its spelling. A window over the last keys stays a mask, since Attention
has none before opset 25.

The key of a sink (see `qexport.rewrite.sinks`), which all queries see, is the first of a cache that has one place more; it
is all zeros, as a new cache is, and nothing is written there.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.errors import QexportError
from qexport.rewrite import DeclinedError, LeftAlone
from qexport.rewrite.classical import tidy
from qexport.rewrite.graph import Builder, attribute, is_op
from qexport.rewrite.masks import depends
from qexport.rewrite.scores import MASKED
from qexport.rewrite.sinks import without_sink
from qexport.rewrite.sites import module_of
from qexport.rewrite.values import known_size, rank, size

PAST_LENGTH = "past_len"


@dataclass(frozen=True)
class Site:
    """One attention that can be cached: its new keys and values, (batch, kv_heads, sequence, size) each, the window (None:
    all the past), and whether it has a sink."""

    node: ir.Node
    new: tuple[ir.Value, ir.Value]
    window: int | None
    sink: bool


def cache_attention(model: ir.Model, length: int, ids: str, positions: str) -> tuple[list[tuple[str, str]], list[LeftAlone]]:
    """Give every Attention of `model` a cache of `length` keys, in place; nothing is changed when one cannot have it.

    Args:
        model: in the classical form, at opset 24, of token ids (batch, sequence) and their positions.
        length: positions of the caches.
        ids, positions: names of the graph inputs; that of the positions is replaced by `past_len` and the caches.

    Returns:
        The names of the new inputs and outputs as (past, present) pairs, and the sites that declined, with the reason.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    nodes = [node for node in model.graph.all_nodes() if is_op(node, "Attention")]
    windows = _Windows(model, inputs[ids], inputs[positions], length)
    sites, left_alone = [], []
    for node in nodes:
        try:
            sites.append(_check(node, model, windows))
        except DeclinedError as reason:
            left_alone.append(LeftAlone(node.name or "", module_of(node), str(reason)))
    if left_alone or not sites:
        return [], left_alone
    shared = _Shared(model, inputs[ids], inputs[positions], length)
    pairs = [pair for layer, site in enumerate(sites) for pair in _cache(model, site, layer, shared)]
    tidy(model)
    return pairs, []


def _check(node: ir.Node, model: ir.Model, windows: "_Windows") -> Site:
    """What the cache of an Attention needs.

    Raises:
        DeclinedError: it is no causal self-attention, or has a past already.
    """
    q, *rest = (*node.inputs[:4], None)[:4]
    bare = without_sink(node)
    k, v, mask = bare or rest
    if any(x is not None for x in node.inputs[4:]):
        raise DeclinedError("it has keys and values of earlier steps already")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise DeclinedError("its keys, values or scores are outputs of the model")
    if node.graph is not model.graph:
        raise DeclinedError("it lies in a branch or loop of the graph")
    if rank(q) != 4 or attribute(node, "q_num_heads"):
        raise DeclinedError("its heads are not an axis of their own")
    if None in (known_size(k, 1), known_size(k, 3), known_size(v, 3)):
        raise DeclinedError("the number or the size of its heads is not told by the graph")
    if size(k, 2) is None or size(k, 2) != size(q, 2):
        raise DeclinedError("its keys are not those of its own queries alone, as in cross-attention")
    return Site(node, (k, v), windows.of(mask, bool(attribute(node, "is_causal", 0))), bare is not None)


class _Windows:
    """The windows of masks, found by computing the masks of texts that fill the cache and of shorter ones."""

    def __init__(self, model: ir.Model, ids: ir.Value, positions: ir.Value, length: int):
        self.model, self.ids, self.positions, self.length = model, ids, positions, length
        self.known: dict[int, int | None] = {}

    def of(self, mask: ir.Value | None, causal: bool) -> int | None:
        """How many keys back a query sees, None when it sees the whole past; `causal` is what the Attention is itself.

        Raises:
            DeclinedError: the mask is no causal one, or depends on the tokens.
        """
        if mask is None:
            if causal:
                return None
            raise DeclinedError("it is not causal: later tokens change what earlier ones see")
        if id(mask) not in self.known:
            if depends(mask, {id(self.ids)}):
                raise DeclinedError("its mask is computed from the tokens")
            half = (self.length + 1) // 2
            window = self._measured(mask, self.length)
            if self._measured(mask, half) != min(window, half):
                raise DeclinedError("its mask depends on the length of the text")
            self.known[id(mask)] = window
        window = self.known[id(mask)]
        return window if window < self.length else None

    def _measured(self, mask: ir.Value, length: int) -> int:
        """The window of the mask of a text of `length` tokens; `length` when there is none."""
        while is_op(mask.producer(), "Expand"):  # to the sizes of the queries, which would have to be computed for it
            mask = mask.producer().inputs[0]
        feeds = {
            self.ids.name: np.zeros((1, length), self.ids.dtype.numpy()),
            self.positions.name: np.arange(length, dtype=self.positions.dtype.numpy())[None],
        }
        array = np.asarray(_compute(self.model, mask, feeds))
        if array.dtype != bool:
            if ((array != 0) & ~(array <= MASKED)).any():
                raise DeclinedError("a bias is added to its scores that depends on the distance")
            array = array == 0
        window = int(array[..., -1, :].sum() / max(array[..., 0, 0].size, 1))
        distance = np.arange(length)[:, None] - np.arange(length)
        if array.shape[-2:] != distance.shape or not (array == ((distance >= 0) & (distance < window))).all():
            raise DeclinedError("its mask is neither causal nor a window over the last keys")
        return window


def _compute(model: ir.Model, value: ir.Value, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """A value of the graph, by running the nodes that lead to it.

    Raises:
        DeclinedError: it needs another input, or onnxruntime cannot run them.
    """
    from onnx import TypeProto, ValueInfoProto, helper

    from qexport.runtime import create_session, quiet_options, run

    needed, todo = {}, [value.producer()]
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in needed:
            needed[id(node)] = node
            todo += [x.producer() for x in node.inputs if x is not None]
    used = {x for node in needed.values() for x in node.inputs if x is not None} | {value}
    given = [x for x in used if x.is_graph_input()]
    if strangers := sorted(x.name for x in given if x.name not in feeds):
        raise DeclinedError(f"its mask is computed from the input {strangers[0]!r}")
    graph = helper.make_graph(
        [ir.to_proto(node) for node in model.graph if id(node) in needed],
        "mask",
        [ir.to_proto(x) for x in given],
        [ValueInfoProto(name=value.name, type=TypeProto())],
        [ir.to_proto(ir.tensor(x.const_value.numpy(), name=x.name)) for x in used if x.is_initializer()],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    try:
        opened = create_session("mask", proto.SerializeToString(), quiet_options(), ["CPUExecutionProvider"], False)
        return run(opened, [value.name], {x.name: feeds[x.name] for x in given})[0]
    except QexportError as error:
        raise DeclinedError(f"its mask cannot be computed: {error}") from error


class _Shared:
    """The values that the caches of all sites share: past_len, nonpad_kv_seqlen, and the masks of windows; with a sink in
    front of the keys, too."""

    def __init__(self, model: ir.Model, ids: ir.Value, positions: ir.Value, length: int):
        self.length = length
        self.builder = builder = Builder(model.graph[0], "kv_cache")
        builder.module = None
        self.batch = size(ids, 0)
        past = _input(model, PAST_LENGTH, ir.DataType.INT64, [self.batch])
        whole = {"dtype": ir.DataType.INT64}
        q_len = builder.axes(ids, 1, 2)
        valid = builder.node("Add", past, q_len, **whole, shape=[self.batch])
        count = builder.node("Squeeze", q_len, [0], **whole, shape=[])
        zero, one = (builder.const(np.int64(number)) for number in (0, 1))
        steps = builder.node("Range", zero, count, one, **whole, shape=[size(ids, 1)])
        starts = builder.node("Unsqueeze", past, [1], **whole, shape=[self.batch, 1])
        self.positions = builder.node("Add", starts, steps, **whole, shape=[self.batch, size(ids, 1)])
        told = builder.node(
            "Cast", self.positions, to=positions.dtype.value, dtype=positions.dtype, shape=self.positions.shape
        )
        positions.replace_all_uses_with(told)
        model.graph.inputs.remove(positions)
        self.masks: dict[tuple[int, bool], ir.Value] = {}
        self.counts: dict[bool, tuple[ir.Value, ir.Value]] = {False: (past, valid)}

    def places(self, sink: bool) -> tuple[ir.Value, ir.Value]:
        """How many places of a cache are taken before and after the new tokens: (batch,) each."""
        if sink not in self.counts:
            whole = {"dtype": ir.DataType.INT64, "shape": [self.batch]}
            one = self.builder.const(np.int64(1))
            self.counts[sink] = tuple(self.builder.node("Add", count, one, **whole) for count in self.counts[False])
        return self.counts[sink]

    def window_mask(self, window: int, sink: bool) -> ir.Value:
        """True where a key lies at most `window - 1` before the query, or is the sink: (batch, 1, q_len, keys)."""
        if (window, sink) not in self.masks:
            builder = self.builder
            last = builder.node("Sub", self.positions, builder.const(np.int64(window)), dtype=ir.DataType.INT64)
            last = builder.node("Unsqueeze", last, [1, 3], dtype=ir.DataType.INT64)
            of_keys = np.arange(self.length)
            if sink:
                of_keys = np.concatenate([[self.length], of_keys])
            shape = [self.batch, 1, size(self.positions, 1), len(of_keys)]
            mask = builder.node("Greater", builder.const(of_keys), last, dtype=ir.DataType.BOOL, shape=shape)
            self.masks[window, sink] = mask
        return self.masks[window, sink]


def _cache(model: ir.Model, site: Site, layer: int, shared: _Shared) -> list[tuple[str, str]]:
    """Put the caches of one site between its keys and values and its Attention; their (past, present) names."""
    node, pairs = site.node, []
    taken, valid = shared.places(site.sink)
    for index, (part, new) in enumerate(zip(("key", "value"), site.new, strict=True), 1):
        shape = [shared.batch, known_size(new, 1), shared.length + site.sink, known_size(new, 3)]
        past = _input(model, f"past_key_values.{layer}.{part}", new.dtype, shape)
        present = ir.Value(name=f"present.{layer}.{part}", type=ir.TensorType(new.dtype), shape=ir.Shape(shape))
        scatter = ir.Node("", "TensorScatter", [past, new, taken], outputs=[present], name=f"{present.name}/append")
        scatter.metadata_props.update(node.metadata_props)
        model.graph.insert_before(node, scatter)
        node.replace_input_with(index, present)
        model.graph.outputs.append(present)
        pairs.append((past.name, present.name))
    node.resize_inputs(7)
    node.replace_input_with(3, shared.window_mask(site.window, site.sink) if site.window is not None else None)
    node.replace_input_with(6, valid)
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    return pairs


def _input(model: ir.Model, name: str, dtype: ir.DataType, shape: list) -> ir.Value:
    """A new graph input.

    Raises:
        QexportError: the name is taken.
    """
    taken = {value.name for value in (*model.graph.inputs, *model.graph.outputs)} | set(model.graph.initializers)
    if name in taken:
        raise QexportError(f"the model has a value named {name!r} already, which the cache needs; rename it")
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    model.graph.inputs.append(value)
    return value
