"""Everything that computes attention, as calls with bound inputs: one-node onnxruntime models, and torch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from qexport.installed import get_library_path, onnxruntime
from qexport.ops import DOMAIN
from qexport.ops.proto import make_node
from qexport.providers import CPU, device, full_names, provider_name
from qexport.runtime import check_providers, create_session, device_of, quiet_options, register_library, run_bound

MICROSOFT = "com.microsoft"
_ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


@dataclass(frozen=True)
class Contender:
    """`call` computes once and copies nothing out; `output` gives its result as float32 (batch, heads, n, head_size).

    `allocates`: bytes of the result that a call allocates; 0 where it writes to memory that is there.
    """

    call: Callable[[], object]
    output: Callable[[], np.ndarray]
    estimate: Callable[[], np.ndarray] | None = None  # error_estimate, (batch, heads)
    allocates: int = 0


def merged(x: np.ndarray) -> np.ndarray:
    """(batch, heads, n, d) -> (batch, n, heads * d)."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1)


def split(x: np.ndarray, heads: int) -> np.ndarray:
    """(batch, n, heads * d) -> (batch, heads, n, d)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def quantum(
    q,
    k,
    v,
    threads: int,
    *,
    causal=False,
    flat=True,
    extra=None,
    present=True,
    estimate=False,
    where: dict | None = None,
    **attributes,
) -> Contender:
    """QuantumAttention on q, k, v (batch, heads, n, d), given to it as (batch, n, heads * d) where `flat`.

    `extra` holds further inputs by their names: with past_key and past_value k and v are the new keys and, if
    `present`, both joined are returned; with nonpad_kv_seqlen k and v are the whole cache, and
    key_summary is updated in place. `estimate` asks for error_estimate. `where`, here and below: the arguments `providers`
    and `allow_fallback` of the session; the CPU when None.
    """
    extra = extra or {}
    heads = {"q_num_heads": q.shape[1], "kv_num_heads": k.shape[1]} if flat else {}
    optional = ("attn_mask", "past_key", "past_value", "nonpad_kv_seqlen", "seed", "key_summary")
    inputs = ["q", "k", "v", *(name if name in extra else "" for name in optional)]
    outputs = ["y", "present_key", "present_value"] if present and "past_key" in extra else ["y"]
    if estimate:
        outputs += [""] * (4 - len(outputs)) + ["error_estimate"]
    shared = {}
    if "key_summary" in extra:
        outputs += [""] * (5 - len(outputs)) + ["present_key_summary"]
        shared = {"key_summary": "present_key_summary"}
    node = make_node("QuantumAttention", inputs, outputs, is_causal=int(causal), **heads, **attributes)
    feeds = {name: merged(x) if flat else x for name, x in (("q", q), ("k", k), ("v", v))} | extra
    return _contender(node, feeds, threads, q.shape[1], flat, shared=shared, where=where)


def multi_head_attention(q, k, v, threads: int, *, causal=False, past=None, where=None) -> Contender:
    """com.microsoft MultiHeadAttention; onnxruntime's flash path where it is not causal and has no past."""
    names, more = ["q", "k", "v"], {}
    if past is not None:
        names, more = [*names, "", "", "", "past_key", "past_value"], past
    flags = {"unidirectional": 1} if causal else {}
    outputs = ["y", "present_key", "present_value"] if past else ["y"]
    node = helper.make_node("MultiHeadAttention", names, outputs, domain=MICROSOFT, num_heads=q.shape[1], **flags)
    feeds = {"q": merged(q), "k": merged(k), "v": merged(v)} | more
    return _contender(node, feeds, threads, q.shape[1], True, where=where)


def onnx_attention(q, k, v, threads: int, *, causal=False, past=None, nonpad_kv_seqlen=None, where=None) -> Contender:
    """ai.onnx Attention on 4-D inputs, with past and present, or over a padded cache (opset 24)."""
    names, more, outputs, opset = ["q", "k", "v"], {}, ["y"], 23
    if past is not None:
        names, more, outputs = [*names, "", "past_key", "past_value"], past, ["y", "present_key", "present_value"]
    if nonpad_kv_seqlen is not None:
        names, more, opset = [*names, "", "", "", "nonpad_kv_seqlen"], {"nonpad_kv_seqlen": nonpad_kv_seqlen}, 24
    node = helper.make_node("Attention", names, outputs, is_causal=int(causal))
    return _contender(node, {"q": q, "k": k, "v": v} | more, threads, q.shape[1], False, opset, where=where)


def group_query_attention(q, k, v, threads: int, *, past_len=0, where=None) -> Contender:
    """com.microsoft GroupQueryAttention, which is always causal.

    Without `past_len` k and v are the prompt's. With it they are the cache (batch, kv_heads, capacity, d), whose entry
    `past_len` is the new key: the op appends it to the first `past_len` entries in place.
    """
    heads = {"num_heads": q.shape[1], "kv_num_heads": k.shape[1]}
    total = past_len + q.shape[2]
    lengths = {"seqlens_k": np.full(q.shape[0], total - 1, np.int32), "total": np.array(total, np.int32)}
    outputs = ["y", "present_key", "present_value"]
    if past_len:
        names = ["q", "k", "v", "past_key", "past_value", "seqlens_k", "total"]
        new = slice(past_len, total)
        feeds = {"q": merged(q), "k": merged(k[:, :, new]), "v": merged(v[:, :, new]), "past_key": k, "past_value": v}
        shared = {"past_key": "present_key", "past_value": "present_value"}
    else:
        names, shared = ["q", "k", "v", "", "", "seqlens_k", "total"], {}
        feeds = {"q": merged(q), "k": merged(k), "v": merged(v)}
    node = helper.make_node("GroupQueryAttention", names, outputs, domain=MICROSOFT, **heads)
    return _contender(node, feeds | lengths, threads, q.shape[1], True, shared=shared, where=where)


def torch_call(function, q, k, v, threads: int, where=None) -> Contender:
    """`function` or module of torch tensors q, k, v (batch, heads, n, d) -> y, on that many threads. It goes to the GPU that
    `where` names, where a call waits for its work."""
    import torch

    kind, number = device(full_names((where or {}).get("providers")))
    place = torch.device(kind, number)
    tensors = [torch.from_numpy(x).to(place) for x in (q, k, v)]
    if isinstance(function, torch.nn.Module):
        function.to(place)
    result = []

    def call():
        torch.set_num_threads(threads)
        with torch.inference_mode():
            result[:] = [function(*tensors)]
        if kind == "cuda":
            torch.cuda.synchronize(place)

    return Contender(call, lambda: result[0].cpu().numpy(), allocates=q.nbytes // q.shape[-1] * v.shape[-1])


def torch_sdpa(q, k, v, threads: int, *, causal=False, where=None) -> Contender:
    """torch.nn.functional.scaled_dot_product_attention."""
    from torch.nn.functional import scaled_dot_product_attention

    grouped = q.shape[1] != k.shape[1]

    def function(*x):
        return scaled_dot_product_attention(*x, is_causal=causal, enable_gqa=grouped)

    return torch_call(function, q, k, v, threads, where)


def _contender(node, feeds, threads, heads, flat, opset=23, shared=None, where=None) -> Contender:
    feeds = {name: np.asarray(x, order="C") for name, x in feeds.items()}
    shared = shared or {}  # input -> the output that lies in its memory
    values = [helper.make_tensor_value_info(name, _ELEMENTS[str(x.dtype)], x.shape) for name, x in feeds.items()]
    names = [name for name in node.output if name]
    kind = _ELEMENTS[str(feeds["q"].dtype)]
    types = {name: TensorProto.FLOAT if name in ("error_estimate", "present_key_summary") else kind for name in names}
    results = [helper.make_tensor_value_info(name, types[name], None) for name in names]
    domains = {"": opset, node.domain: {MICROSOFT: 1, DOMAIN: 1, "": opset}[node.domain]}
    graph = helper.make_graph([node], "attention", values, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in domains.items()], ir_version=10)
    options = quiet_options(threads)
    # The idle threads of one contender must not spin while another is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    register_library(options, get_library_path())
    session = create_session(node.op_type, model.SerializeToString(), options, _providers(options, **(where or {})), True)

    # onnxruntime reads and writes these arrays where they lie; `present` alone it allocates itself, as in generation.
    # zeros_like writes to every page, so that no call is the first to touch one.
    arrays = feeds | {"y": np.zeros_like(feeds["q"]), "error_estimate": np.empty((feeds["q"].shape[0], heads), np.float32)}
    binding, kept, at = session.io_binding(), arrays, device_of(session)
    if at[0] != "cpu":  # copies on the device, which calls read and write there
        kept = {name: onnxruntime().OrtValue.ortvalue_from_numpy(array, *at) for name, array in arrays.items()}
    for values in (arrays, kept):
        values.update({output: values[source] for source, output in shared.items()})

    def place(name):
        array, value = arrays[name], kept[name]
        address = array.ctypes.data if value is array else value.data_ptr()
        return name, *at, _ELEMENTS[str(array.dtype)], array.shape, address

    for name in feeds:
        binding.bind_input(*place(name))
    for name in names:
        binding.bind_output(*(place(name) if name in arrays else (name, *at)))

    def call(_kept=kept):  # the binding knows addresses alone: whoever may call keeps the arrays alive
        run_bound(session, binding)

    def found(name):
        return kept[name].copy() if at[0] == "cpu" else kept[name].numpy()

    def output():
        y = found("y").astype(np.float32, copy=False)
        return split(y, heads) if flat else y

    return Contender(call, output, (lambda: found("error_estimate")) if "error_estimate" in names else None)


def _providers(options, providers=None, allow_fallback=False) -> list:
    """The providers of a session. Unless it may, a node does not run on the CPU where another one is asked for: it would be
    timed with the copies there and back, under the name of a GPU."""
    found = check_providers(providers)
    if allow_fallback or provider_name(found[0]) == CPU:
        return found
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return [provider for provider in found if provider_name(provider) != CPU]  # it excludes the other
