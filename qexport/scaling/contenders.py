"""Who takes part in a sweep: every strategy of QuantumAttention, the exact attentions of onnxruntime and torch, and other
approximations."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from qexport import _core
from qexport.providers import device, full_names
from qexport.recipe import defaults
from qexport.scaling import baselines, nodes

SAMPLES = 32  # of the strategies that draw keys
TREE_KEYS = 256
DENSITIES = (16, 8, 4)  # n over the number of keys that `tree` reads exactly
TOLERANCE = 0.1
TOP, RANK, SHARE = 64, 256, 8  # keys of top-k, mixtures of Linformer, n over the keys of uniform sampling


@dataclass(frozen=True)
class Entry:
    """One contender: `make(q, k, v, threads, causal)` binds it to inputs (1, heads, n, head_size).

    `keys(n)`: how many of n value rows a query reads, where it learns nothing of the others; else None. `absent` says why it
    cannot take part, "" when it can.
    """

    name: str
    family: str
    provider: str
    make: Callable[..., nodes.Contender]
    keys: Callable[[int], int] | None = None
    absent: str = ""


# family(causal, where): the contenders of one name of --strategies.
Family = Callable[[bool, dict], list[Entry]]


def entries(causal: bool, where: dict) -> list[Entry]:
    """Everybody, in the order of the reports, those that cannot take part with the reason; `where`: the arguments
    `providers` and `allow_fallback` of their sessions."""
    return [entry for family in FAMILIES.values() for entry in family(causal, where)]


def _ours(name: str, family: str, where: dict, keys=None, absent: str = "", **attributes) -> Entry:
    """A strategy of the op; a number of samples may depend on n."""

    def make(q, k, v, threads, causal):
        named = {key: value(q.shape[2]) if callable(value) else value for key, value in attributes.items()}
        return nodes.quantum(q, k, v, threads, causal=causal, where=where, **named)

    return Entry(name, family, "qexport", make, keys, absent)


def _exact(causal: bool, where: dict) -> list[Entry]:
    there, away = _core.precisions(), f"needs products in {{}}, which the kernels for {_core.isa()} do not have"
    if device(full_names(where.get("providers")))[0] == "cuda":
        there, away = ["fp32"], "on CUDA float32 is not computed in {}"
    absent = {name: "" if name in there else away.format(name) for name in ("fp32", "bf16", "int8")}
    return [
        _ours(f"exact {name}", "exact", where, strategy="exact", precision=name, absent=reason)
        for name, reason in absent.items()
    ]


def _default(causal: bool, where: dict) -> list[Entry]:
    return [_ours("default", "default", where, **defaults({}))]


def _tree(causal: bool, where: dict) -> list[Entry]:
    fixed = {"strategy": "tree", "precision": "auto"}
    found = [_ours(f"tree {TREE_KEYS} keys", "tree", where, num_samples=[TREE_KEYS], **fixed)]
    for density in DENSITIES:
        samples = {"num_samples": lambda n, d=density: [max(1, n // d)]}
        found.append(_ours(f"tree 1/{density}", "tree", where, **samples, **fixed))
    tolerant = {"num_samples": [SAMPLES], "error_tolerance": TOLERANCE}
    return [*found, _ours(f"tree, tolerance {TOLERANCE}", "tree", where, **tolerant, **fixed)]


def _drawing(strategy: str) -> Family:
    # hybrid knows the means of clusters, except where it is causal
    def family(causal: bool, where: dict) -> list[Entry]:
        knows_more = strategy == "hybrid" and not causal
        keys = None if knows_more else lambda n: SAMPLES
        return [_ours(f"{strategy} {SAMPLES}", strategy, where, keys, strategy=strategy, num_samples=[SAMPLES])]

    return family


def _other(name: str, provider: str, build, keys=None, order: bool | None = None) -> Family:
    """Somebody else's attention, `build(q, k, v, threads, causal, where)`; `order`: the only value of causal that it has."""
    absent = {None: "", True: "it is always causal", False: "it has no causal form"}[order]

    def family(causal: bool, where: dict) -> list[Entry]:
        make = functools.partial(build, where=where)
        return [Entry(name, name.split()[0], provider, make, keys, "" if order in (None, causal) else absent)]

    return family


def _in_torch(name: str, package: str, function, keys=None, order: bool | None = None) -> Family:
    """The same from `function(n, heads, head_size, causal)`, which makes a function of torch tensors."""

    def build(q, k, v, threads, causal, where):
        _, heads, n, size = q.shape
        return nodes.torch_call(function(n, heads, size, causal), q, k, v, threads, where)

    return _other(name, package, build, keys, order)


# What --strategies takes -> its contenders.
FAMILIES: dict[str, Family] = {
    "exact": _exact,
    "default": _default,
    "tree": _tree,
    **{strategy: _drawing(strategy) for strategy in ("stratified", "adaptive", "hybrid", "naive")},
    "MultiHeadAttention": _other(
        "MultiHeadAttention",
        "onnxruntime",
        lambda q, k, v, t, causal, where: nodes.multi_head_attention(q, k, v, t, causal=causal, where=where),
    ),
    "Attention": _other(
        "Attention",
        "onnxruntime",
        lambda q, k, v, t, causal, where: nodes.onnx_attention(q, k, v, t, causal=causal, where=where),
    ),
    "GroupQueryAttention": _other(
        "GroupQueryAttention",
        "onnxruntime",
        lambda q, k, v, t, _, where: nodes.group_query_attention(q, k, v, t, where=where),
        order=True,
    ),
    "SDPA": _other(
        "SDPA", "torch", lambda q, k, v, t, causal, where: nodes.torch_sdpa(q, k, v, t, causal=causal, where=where)
    ),
    "Performer": _in_torch(
        "Performer", "performer-pytorch", lambda n, heads, size, causal: baselines.performer(None, size, causal)
    ),
    "Linformer": _in_torch(
        f"Linformer {RANK}", "linformer", lambda n, heads, size, _: baselines.linformer(RANK, n, heads, size), order=False
    ),
    "top-k": _in_torch(
        f"top-k {TOP}", "torch", lambda n, heads, size, causal: baselines.top_k(TOP, False, causal), lambda n: TOP
    ),
    "uniform": _in_torch(
        f"uniform 1/{SHARE}",
        "torch",
        lambda n, heads, size, _: baselines.uniform(max(1, n // SHARE)),
        lambda n: max(1, n // SHARE),
        order=False,
    ),
}
