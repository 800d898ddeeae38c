"""QuantumAttention as a function of torch tensors: traced by torch.compile and torch.export, exported to ONNX as one node.

The operator `qexport::quantum_attention` (torch.library) computes the output; its gradient is that of the Horvitz-Thompson
form (docs/theory.md, "Gradients"): the keys that were drawn and their inclusion probabilities are constants, the softmax
weights are not. It is computed by the reference at the same seed, which needs a few (batch, heads, q_len, kv_len) arrays.
`exact` and `tree` have the gradient of exact attention, which `tree` approximates.
"""

import contextlib
from contextvars import ContextVar
from dataclasses import replace

import torch

from qexport.arguments import as_seed, check_tensors, real
from qexport.errors import UsageError
from qexport.nn.backends import AttentionCall, chosen_backend, get_backend
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.strategies import BLOCKWISE, check_read


def quantum_attention(
    Q,
    K,
    V,
    attn_mask=None,
    seed=0,
    *,
    backend: str = "auto",
    dropout_p: float = 0.0,
    need_weights: bool = False,
    **attributes,
):
    """Attention by sampling.

    Args:
        Q: (batch, q_heads, q_len, head_size), or (batch, q_len, q_heads * head_size) with `q_num_heads` and `kv_num_heads`.
        K, V: likewise, of kv_heads heads; q_heads must be a multiple of kv_heads.
        attn_mask: bool (true = attend) or of Q's type (added to the scores), broadcastable to
            (batch, q_heads, q_len, kv_len).
        seed: int, or an int64 scalar tensor (which a compiled graph takes as an input); the same seed draws the same keys.
            The kernels of a CUDA device read one there when they run, so that a replayed CUDA graph draws anew.
        backend: `auto`, or a name of `qexport.nn.backend_names()`.
        dropout_p: share of the softmax weights that is dropped.
        need_weights: also return the softmax probabilities. They are what is sampled from, not what was drawn.
        attributes: strategy, num_samples, control_variate, precision, error_tolerance, residual, layer, is_causal, scale,
            softcap, q_num_heads, kv_num_heads, with the defaults of the op table; those that the strategy reads.

    Returns:
        The output, shaped as Q with V's head size; with `need_weights` also the
            probabilities (batch, q_heads, q_len, kv_len).

    Raises:
        UsageError: an unknown backend, an attribute outside its limits, or a call that the backend does not take.
        ValueError: shapes that do not fit each other.
    """
    check_tensors({"Q": Q, "K": K, "V": V}, {"attn_mask": attn_mask})
    seed, dropout_p = seed_argument(seed), real("dropout_p", dropout_p)
    for key in attributes:
        if key not in ATTRIBUTES:
            raise UsageError(f"[{QUANTUM_ATTENTION.name}] has no attribute {key!r} in torch; known: {', '.join(ATTRIBUTES)}")
    a = QUANTUM_ATTENTION.resolve(attributes)
    check_read(a["strategy"], {key: a[key] for key, value in attributes.items() if value is not None})
    Y, weights = attend(Q, K, V, attn_mask, seed, backend, dropout_p, need_weights, a)
    return (Y, weights) if need_weights else Y


def seed_argument(seed):
    """A seed as `as_seed` wants it, or a tensor that holds one, which is not looked into: it may be on a device.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(seed, torch.Tensor):
        return as_seed(seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise UsageError(f"seed must be one number of int64, got {tuple(seed.shape)} of {seed.dtype}")
    return seed


def attend(Q, K, V, attn_mask, seed, backend: str, dropout_p: float, need_weights: bool, attributes: dict):
    """(output, weights or None) of `quantum_attention` with all attributes of the op, checked already."""
    need_weights = bool(need_weights)
    if attn_mask is not None and attn_mask.shape[-1:] in ((), (1,)):  # the op takes a short mask for one of the first keys
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], K.shape[-2])
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, Q.dtype) and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(Q.dtype)
    if _is_plain(Q, K, V, attn_mask):
        return _compute(AttentionCall(Q, K, V, attn_mask, attributes, seed, need_weights, dropout_p), backend)
    values = [attributes[name] for name in ATTRIBUTES]
    seed = torch.as_tensor(seed, dtype=torch.int64)
    Y, weights = _attention(Q, K, V, attn_mask, seed, backend, dropout_p, need_weights, *values)
    return Y, weights if need_weights else None


_EXACT = ContextVar("qexport_exact", default=False)


@contextlib.contextmanager
def exact_attention():
    """A context in which every `quantum_attention` is computed exactly, whatever its strategy: the classical model.

        with exact_attention():
            baseline = model(inputs)

    It holds for the thread, and for the backward pass of what was computed in it if that runs inside too.
    """
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


def is_exact() -> bool:
    """Whether this is inside `exact_attention()`."""
    return _EXACT.get()


# Of the op table, those that a torch program can set.
ATTRIBUTES = (
    *("strategy", "num_samples", "control_variate", "precision", "error_tolerance", "residual", "layer"),
    *("is_causal", "scale", "softcap", "q_num_heads", "kv_num_heads"),
)


# Kinds of attributes as torch writes them in a schema.
ATTRIBUTE_TYPES = {"int": "int", "ints": "int[]", "float": "float", "string": "str"}
_SCHEMA = ", ".join(
    f"{ATTRIBUTE_TYPES[attr.kind]}{'?' if attr.default is None else ''} {attr.name}"
    for attr in map(QUANTUM_ATTENTION.attribute, ATTRIBUTES)
)


def _attributes(values) -> dict:
    """All attributes of the op from those of ATTRIBUTES."""
    return QUANTUM_ATTENTION.resolve(dict(zip(ATTRIBUTES, values, strict=True)))


def _exactly(attributes: dict) -> dict:
    return attributes | {"strategy": "exact", "error_tolerance": 0.0}


def _compute(call: AttentionCall, backend: str):
    _check(call)
    if is_exact():
        call = replace(call, attributes=_exactly(call.attributes))
    name = chosen_backend(backend, call.Q, call.dropout_p)
    if not (name == "kernel" and call.Q.is_cuda):  # they read it on the device, without waiting for it
        call = replace(call, seed=int(call.seed))
    return get_backend(name)(call)


def _check(call: AttentionCall) -> None:
    """Raise ValueError for tensors that do not fit each other, before any backend sees them."""
    Q, K, V, mask, a = call.Q, call.K, call.V, call.attn_mask, call.attributes
    if not Q.is_floating_point() or not Q.dtype == K.dtype == V.dtype:
        raise ValueError(f"Q, K and V must share one float type, got {Q.dtype}, {K.dtype} and {V.dtype}")
    if mask is not None and mask.dtype not in (torch.bool, Q.dtype):
        raise ValueError(f"attn_mask must be bool (true = attend) or float (added to the scores), got {mask.dtype}")
    if not 0 <= call.dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {call.dropout_p:g}")
    devices = [x.device for x in (Q, K, V, mask) if x is not None]
    if any(device != Q.device for device in devices):
        raise ValueError(f"Q, K, V and attn_mask must be on one device, got {', '.join(map(str, devices))}")
    if Q.dim() not in (3, 4) or not Q.dim() == K.dim() == V.dim():
        raise ValueError(f"Q, K and V must all have 4 dimensions, or all 3, got {_shapes(call)}")
    if Q.dim() == 4:
        q_heads, kv_heads, v_heads = Q.shape[1], K.shape[1], V.shape[1]
        fits = kv_heads == v_heads > 0 and q_heads % kv_heads == 0 and Q.shape[3] == K.shape[3]
        said = a["q_num_heads"] or q_heads, a["kv_num_heads"] or kv_heads
        if said != (q_heads, kv_heads):
            raise ValueError(f"q_num_heads and kv_num_heads are {said[0]} and {said[1]}, but got {_shapes(call)}")
    else:
        q_heads, kv_heads = a["q_num_heads"], a["kv_num_heads"]
        if q_heads is None or kv_heads is None:
            raise ValueError(f"3-D inputs need q_num_heads and kv_num_heads, got {_shapes(call)}")
        fits = q_heads % kv_heads == 0 and Q.shape[2] * kv_heads == K.shape[2] * q_heads
        fits = fits and Q.shape[2] % q_heads == 0 and V.shape[2] % kv_heads == 0
    if not fits or K.shape[-2] != V.shape[-2] or not Q.shape[0] == K.shape[0] == V.shape[0]:
        heads = f" with {q_heads} and {kv_heads} heads" if Q.dim() == 3 else ""
        raise ValueError(f"Q, K and V do not fit each other, got {_shapes(call)}{heads}")
    if len(a["num_samples"]) not in (1, q_heads):
        raise ValueError(f"num_samples must hold 1 number or {q_heads}, one per query head, got {len(a['num_samples'])}")
    if mask is not None:
        scores = Q.shape[0], q_heads, Q.shape[-2], K.shape[-2]
        if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], scores[::-1], strict=False)):
            raise ValueError(f"attn_mask must broadcast to {scores}, got {tuple(mask.shape)}")


def _shapes(call: AttentionCall) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("Q", call.Q), ("K", call.K), ("V", call.V)))


def _operator(Q, K, V, attn_mask, seed, backend, dropout_p, need_weights, *values):
    call = AttentionCall(Q, K, V, attn_mask, _attributes(values), seed, need_weights, dropout_p)
    Y, weights = _compute(call, backend)
    return Y, Y.new_empty(0) if weights is None else weights


_attention = torch.library.custom_op(
    "qexport::quantum_attention",
    _operator,
    mutates_args=(),
    schema="(Tensor Q, Tensor K, Tensor V, Tensor? attn_mask, Tensor seed, str backend, float dropout_p, bool need_weights, "
    f"{_SCHEMA}) -> (Tensor, Tensor)",
)


def _is_plain(*tensors) -> bool:
    """Whether this is a call in eager mode through which no gradient flows: it needs no operator around the backend."""
    if torch.compiler.is_compiling():
        return False
    given = [x for x in tensors if x is not None]
    return all(type(x) is torch.Tensor for x in given) and not (
        torch.is_grad_enabled() and any(x.requires_grad for x in given)
    )


@_attention.register_fake
def _(Q, K, V, attn_mask, seed, backend, dropout_p, need_weights, *more):
    *_, q_heads, kv_heads = more
    if Q.dim() == 3:
        Y = Q.new_empty(Q.shape[0], Q.shape[1], V.shape[2] // kv_heads * q_heads)
        rows = (Q.shape[0], q_heads, Q.shape[1], K.shape[1])
    else:
        Y = Q.new_empty(*Q.shape[:3], V.shape[3])
        rows = (*Q.shape[:3], K.shape[2])
    return Y, Q.new_empty(rows if need_weights else 0)


@contextlib.contextmanager
def autograd_inside(device: torch.device):
    """Autograd inside an operator, which runs below it: its dispatch keys are kept out there, with those of autocast, which
    stays off. (torch.func.vjp would do, but not in an operator that is called from a dispatch mode.)"""
    included, nothing = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(included, nothing), torch.autocast(device.type, enabled=False), torch.enable_grad():
        yield


@torch.library.custom_op(
    "qexport::quantum_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_Y, Tensor? grad_weights, Tensor Q, Tensor K, Tensor V, Tensor? attn_mask, Tensor seed, "
    f"float dropout_p, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad_Y, grad_weights, Q, K, V, attn_mask, seed, dropout_p, *values):
    attributes = _attributes(values)
    if attributes["strategy"] in BLOCKWISE or is_exact():
        attributes = _exactly(attributes)
    float_mask = attn_mask is not None and attn_mask.dtype != torch.bool
    with autograd_inside(Q.device):
        leaves = [x.detach().requires_grad_() for x in (Q, K, V, *([attn_mask] if float_mask else []))]
        mask = leaves[3] if float_mask else attn_mask
        call = AttentionCall(*leaves[:3], mask, attributes, int(seed), grad_weights is not None, dropout_p)
        outputs = get_backend("reference")(call)
        count = 1 if grad_weights is None else 2
        found = torch.autograd.grad(outputs[:count], leaves, (grad_Y, grad_weights)[:count], materialize_grads=True)
    # An operator returns no alias of an input, and no None.
    return tuple(x.contiguous() for x in found) + (() if float_mask else (Q.new_empty(0),))


@_backward.register_fake
def _(grad_Y, grad_weights, Q, K, V, attn_mask, seed, *more):
    float_mask = attn_mask is not None and attn_mask.dtype != torch.bool
    mask = attn_mask.new_empty(attn_mask.shape) if float_mask else Q.new_empty(0)
    return *(x.new_empty(x.shape) for x in (Q, K, V)), mask


def _setup_context(ctx, inputs, output):
    Q, K, V, attn_mask, seed, _, dropout_p, need_weights, *values = inputs
    if is_exact():  # the backward may come after the context has ended
        values = [_exactly(_attributes(values))[name] for name in ATTRIBUTES]
    ctx.save_for_backward(Q, K, V, attn_mask, seed)
    ctx.more = dropout_p, *values
    ctx.need_weights = need_weights


def _gradient(ctx, grad_Y, grad_weights):
    Q, K, V, attn_mask, seed = ctx.saved_tensors
    grads = _backward(grad_Y, grad_weights if ctx.need_weights else None, Q, K, V, attn_mask, seed, *ctx.more)
    float_mask = attn_mask is not None and attn_mask.dtype != torch.bool
    return *grads[:3], grads[3] if float_mask else None, *[None] * (len(ctx.more) + 3)


_attention.register_autograd(_gradient, setup_context=_setup_context)
