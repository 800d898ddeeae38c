"""Contenders on the device: one-node models in onnxruntime with everything bound there, and functions of torch."""

import contextlib
import functools
import os

import torch
from onnx import TensorProto, helper

from bench.cuda.measure import Contender
from qexport.installed import get_library_path, onnxruntime
from qexport.ops import DOMAIN
from qexport.ops.proto import make_node
from qexport.runtime import create_session, quiet_options, register_library, run_bound

MICROSOFT = "com.microsoft"
OPSET = 23
ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}


def node_model(node, feeds: dict, outputs: dict, constants: dict) -> bytes:
    """A model of `node`. `feeds` and `outputs`: name -> tensor of that type and rank; `constants`: initializers. Sizes are
    left open, so that a session serves many lengths."""
    # onnxruntime's shape inference of Attention makes 0 of an open size.
    open_sizes = node.op_type != "Attention"

    def value(name, tensor):
        shape = [None] * tensor.dim() if open_sizes else tensor.shape
        return helper.make_tensor_value_info(name, ELEMENTS[tensor.dtype], shape)

    weights = [
        helper.make_tensor(n, ELEMENTS[t.dtype], t.shape, t.cpu().numpy().tobytes(), True) for n, t in constants.items()
    ]
    inputs, results = ([value(*item) for item in tensors.items()] for tensors in (feeds, outputs))
    graph = helper.make_graph([node], node.op_type, inputs, results, weights)
    domains = {node.domain: 1, "": OPSET}
    opsets = [helper.make_opsetid(*item) for item in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@functools.lru_cache(maxsize=64)
def _session(model: bytes, op: str, ours: bool, device: str, stream: int, provider: tuple):
    options = quiet_options(os.cpu_count() if device == "cpu" else 1)
    if ours:
        register_library(options, get_library_path())
    if device == "cpu":
        return create_session(op, model, options, ["CPUExecutionProvider"], True)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # what has no CUDA kernel fails
    cuda = ("CUDAExecutionProvider", {"user_compute_stream": str(stream), "use_tf32": "0"} | dict(provider))
    return create_session(op, model, options, [cuda], True)


def _run_options():
    options = onnxruntime().RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def node_contender(
    node,
    sets: list[dict],
    outputs: list[dict],
    device: str,
    *,
    constants=None,
    shared=None,
    host=(),
    view=None,
    provider=(),
) -> Contender:
    """A node in a session of onnxruntime whose inputs and outputs stay where they are.

    Args:
        sets: of inputs, name -> tensor.
        outputs: for each set, name -> tensor that the result is written to. The node's first is what the contender gives.
        constants: initializers, name -> tensor.
        shared: output -> the input whose memory it shares.
        host: names of inputs that the op reads on the host.
        view: what is made of the first output before it is compared.
        provider: more options of the CUDA provider, as pairs.
    """
    for inputs, results in zip(sets, outputs, strict=True):
        results |= {output: inputs[source] for output, source in (shared or {}).items()}
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    model = node_model(node, sets[0], outputs[0], constants or {})
    session = _session(model, node.op_type, node.domain == DOMAIN, device, stream, provider)
    options = _run_options()

    def bound(inputs, results):
        binding = session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *_place(tensor.cpu() if name in host else tensor))
        for name, tensor in results.items():
            binding.bind_output(name, *_place(tensor))
        kept = inputs, results  # the binding knows addresses alone
        return lambda _kept=kept: run_bound(session, binding, options)

    calls = [bound(*pair) for pair in zip(sets, outputs, strict=True)]

    def output(place):
        y = outputs[place][node.output[0]]
        return view(y) if view else y

    return Contender(calls, output)


def _place(tensor):
    assert tensor.is_contiguous()
    return tensor.device.type, tensor.device.index or 0, ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def cpu_output(node, inputs: dict, output: torch.Tensor, constants=None) -> torch.Tensor:
    """What the CPU kernels make of the same node and inputs."""
    host = {name: tensor.cpu() for name, tensor in inputs.items()}
    result = {node.output[0]: torch.empty_like(output, device="cpu")}
    contender = node_contender(node, [host], [result], "cpu", constants=constants)
    return contender.result()


# Sets of attention are (q, k, v), (batch, n, heads * d) each, as projections make them.


def heads_of(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, n, heads * d) -> a view (batch, heads, n, d)."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention_node(node, sets, heads, device, provider=()) -> Contender:
    named = [dict(zip("qkv", tensors, strict=True)) for tensors in sets]
    outputs = [{"y": torch.empty_like(inputs["q"])} for inputs in named]
    return node_contender(node, named, outputs, device, view=lambda y: heads_of(y, heads), provider=provider)


def quantum(sets, heads: int, kv_heads: int, device: str, **attributes) -> Contender:
    """QuantumAttention in onnxruntime."""
    return _attention_node(quantum_node(heads, kv_heads, **attributes), sets, heads, device)


def quantum_node(heads: int, kv_heads: int, **attributes):
    return make_node("QuantumAttention", ["q", "k", "v"], ["y"], q_num_heads=heads, kv_num_heads=kv_heads, **attributes)


def quantum_in_torch(sets, heads: int, kv_heads: int, **attributes) -> Contender:
    """The same through torch, by the kernels alone."""
    from qexport.nn import quantum_attention

    more = {"q_num_heads": heads, "kv_num_heads": kv_heads, "backend": "kernel"}
    return torch_contender(lambda q, k, v: heads_of(quantum_attention(q, k, v, **more, **attributes), heads), sets)


def multi_head_attention(sets, heads: int, device: str, causal: bool, own_flash: bool = False) -> Contender:
    """com.microsoft MultiHeadAttention. In 16 bits that is flash attention: cuDNN's on newer cards, onnxruntime's own
    (FlashAttention-2) elsewhere, or with `own_flash`."""
    flags = {"unidirectional": 1} if causal else {}
    node = helper.make_node("MultiHeadAttention", list("qkv"), ["y"], domain=MICROSOFT, num_heads=heads, **flags)
    # Flag FLASH_ATTENTION of onnxruntime's AttentionBackend, and no other.
    return _attention_node(node, sets, heads, device, (("sdpa_kernel", "1"),) if own_flash else ())


def onnx_attention(sets, heads: int, kv_heads: int, device: str, causal: bool) -> Contender:
    """ai.onnx Attention."""
    node = helper.make_node("Attention", list("qkv"), ["y"], is_causal=int(causal), q_num_heads=heads, kv_num_heads=kv_heads)
    return _attention_node(node, sets, heads, device)


def group_query_attention(sets, heads: int, kv_heads: int, device: str) -> Contender:
    """com.microsoft GroupQueryAttention of a prompt, which is causal. It writes the caches too: without them onnxruntime
    1.30 ends the process."""
    batch, n, width = sets[0][1].shape
    outputs, names = ["y", "present_key", "present_value"], ["q", "k", "v", "", "", "seqlens_k", "total"]
    node = helper.make_node("GroupQueryAttention", names, outputs, domain=MICROSOFT, num_heads=heads, kv_num_heads=kv_heads)
    named = [dict(zip("qkv", tensors, strict=True)) | _lengths(batch, n, device) for tensors in sets]
    caches = sets[0][1].new_empty((2, batch, kv_heads, n, width // kv_heads))
    results = [dict(zip(outputs, (torch.empty_like(inputs["q"]), *caches), strict=True)) for inputs in named]
    return node_contender(node, named, results, device, host=("total",), view=lambda y: heads_of(y, heads))


def group_query_step(sets, device: str, past: int) -> Contender:
    """GroupQueryAttention of one new token; sets are (q (batch, heads, 1, d), caches (batch, kv_heads, capacity, d) of k and
    v with `past` + 1 entries). It appends the new key to the cache in place."""
    q, k, _ = sets[0]
    names = ["q", "k", "v", "past_key", "past_value", "seqlens_k", "total"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["y", "present_key", "present_value"],
        domain=MICROSOFT,
        num_heads=q.shape[1],
        kv_num_heads=k.shape[1],
    )
    lengths = _lengths(len(q), past + 1, device)
    named = []
    for query, keys, values in sets:
        new = {name: cache[:, :, past].flatten(1)[:, None].contiguous() for name, cache in (("k", keys), ("v", values))}
        named.append({"q": query.flatten(1)[:, None], **new, "past_key": keys, "past_value": values} | lengths)
    outputs = [{"y": torch.empty_like(inputs["q"])} for inputs in named]
    shared = {"present_key": "past_key", "present_value": "past_value"}
    return node_contender(
        node, named, outputs, device, shared=shared, host=("total",), view=lambda y: heads_of(y, q.shape[1])
    )


def _lengths(batch: int, total: int, device: str) -> dict:
    seqlens = torch.full((batch,), total - 1, dtype=torch.int32, device=device)
    return {"seqlens_k": seqlens, "total": torch.tensor(total, dtype=torch.int32)}


def quantum_step(sets, device: str, past: int, summary: bool = False, **attributes) -> Contender:
    """QuantumAttention of one new token over such caches; `summary`: with a summary of the cache, which it keeps."""
    from qexport.ops.key_summary import key_summary_shape

    inputs = ["q", "k", "v", "", "", "", "nonpad_kv_seqlen", "", "key_summary" if summary else ""]
    outputs = ["y", "", "", "", "", "present_key_summary"] if summary else ["y"]
    node = make_node("QuantumAttention", inputs, outputs, **attributes)
    named = [dict(zip("qkv", tensors, strict=True)) for tensors in sets]
    for tensors in named:
        tensors["nonpad_kv_seqlen"] = torch.tensor([past + 1], device=device)
        if summary:
            shape = key_summary_shape(*tensors["k"].shape, tensors["v"].shape[-1])
            tensors["key_summary"] = torch.zeros(shape, device=device)
    results = [{"y": torch.empty_like(tensors["q"])} for tensors in named]
    shared = {"present_key_summary": "key_summary"} if summary else None
    return node_contender(node, named, results, device, shared=shared)


def quantum_step_in_torch(sets) -> Contender:
    """The same through torch: q (batch, heads, 1, d), k and v (batch, kv_heads, n, d), all of which are attended to."""
    from qexport.nn import quantum_attention

    return torch_contender(lambda q, k, v: quantum_attention(q, k, v, strategy="exact", backend="kernel"), sets)


def torch_contender(function, sets) -> Contender:
    """`function` of the tensors of a set."""
    results = {}

    def bound(place, tensors):
        def call():
            with torch.inference_mode():
                results[place] = function(*tensors)

        return call

    return Contender([bound(*item) for item in enumerate(sets)], results.__getitem__)


def torch_attention(sets, heads: int, kv_heads: int, causal: bool, backend: str | None) -> Contender:
    """torch's scaled_dot_product_attention by that backend (of torch.nn.attention.SDPBackend); its own choice when None."""

    def split(q, k, v):
        return heads_of(q, heads), heads_of(k, kv_heads), heads_of(v, kv_heads)

    return sdpa([split(*tensors) for tensors in sets], causal, backend)


def sdpa(sets, causal: bool, backend: str | None) -> Contender:
    """The same of (batch, heads, n, d)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    grouped = sets[0][0].shape[1] != sets[0][1].shape[1]

    def function(q, k, v):
        with contextlib.nullcontext() if backend is None else sdpa_kernel([getattr(SDPBackend, backend)]):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return torch_contender(function, sets)


def random_sets(shapes: list[tuple], count: int, dtype, device: str, seed: int = 0) -> list[tuple]:
    """`count` sets of tensors of these shapes, N(0, 1)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return [
        tuple(torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype) for shape in shapes)
        for _ in range(count)
    ]
