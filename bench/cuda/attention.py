"""QuantumAttention on the device: exact, by drawing keys, `tree` on trained activations, and steps of decoding."""

import functools

import torch

from bench.cuda import nodes
from bench.cuda.measure import cache_bytes, compared, number_of_sets
from bench.cuda.models import Activations
from bench.cuda.runner import Case

HEADS, SIZE = 8, 64
ROWS = 256  # queries whose error is measured, evenly spaced
SAMPLES = 32
DENSITIES = (16, 8, 4)  # n over the number of keys that `tree` reads one by one
STRATEGIES = ("naive", "stratified", "adaptive", "hybrid")
# Largest relative error against float64 of what is exact, in the elements' type.
LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Of the rows of a strategy that draws, so many may differ from the CPU's for each key: sums in another order move the edges
# of the distribution by a few 2^-24, a draw that falls between is another key's, and an edge lies the nearer the more keys
# there are. They also move keys between the clusters of hybrid and tree: their errors may differ by so much of the CPU's.
MOST_OTHER_ROWS, MOST_OTHER_ERROR = 8e-6, 0.05
ROUNDING = 1e-3  # of 16-bit outputs
ON_CPU = 4096  # tokens up to which tree is held against the CPU's, which takes seconds beyond
FLASH, OWN_FLASH, TORCH = "onnxruntime MultiHeadAttention", "onnxruntime MultiHeadAttention, own flash", "torch flash"
GROUPED = "onnxruntime GroupQueryAttention"
PREFILL_RIVALS = {"x_flash": FLASH, "x_own_flash": OWN_FLASH, "x_gqa": GROUPED, "x_torch_flash": TORCH}
STEP_RIVALS = {"x_gqa": GROUPED, "x_torch_flash": TORCH}

TREE_LENGTHS, FLOAT32_LENGTH = (16384, 65536, 4096), 16384
EXACT_CASES = (
    *((n, SIZE, causal, torch.float16) for n in (32, 128, 512, 1024, 2048, 4096, 16384, 65536) for causal in (False, True)),
    *((n, 128, causal, torch.float16) for n in (512, 4096) for causal in (False, True)),
    *((n, SIZE, causal, torch.bfloat16) for n in (512, 4096) for causal in (False, True)),
    *((n, SIZE, False, torch.float32) for n in (512, 4096)),
)
QUICK_EXACT = ((32, SIZE, False, torch.float16), (48, SIZE, True, torch.float32))


def type_name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows_of(n: int, device: str) -> torch.Tensor:
    """The queries that are compared: ROWS of them or all, evenly spaced."""
    return torch.linspace(0, n - 1, min(n, ROWS), dtype=torch.float64).round().long().to(device)


def expected(q, k, v, rows, causal: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in float64 for the queries `rows` of (1, heads, n, d); K and V may have fewer heads."""
    group = q.shape[1] // k.shape[1]
    hidden = torch.arange(k.shape[2], device=q.device) > rows[:, None] + (k.shape[2] - q.shape[2])
    found = []
    for head in range(q.shape[1]):
        scores = q[0, head, rows].double() @ k[0, head // group].double().T / q.shape[-1] ** 0.5
        if causal:
            scores.masked_fill_(hidden, -torch.inf)
        found.append(torch.softmax(scores, -1) @ v[0, head // group].double())
    return torch.stack(found)[None]


def errors(output, wanted, rows) -> torch.Tensor:
    """Relative Frobenius error of each head, of an output (1, heads, n, d) at these rows."""
    return ((output[:, :, rows].double() - wanted).norm(dim=(-2, -1)) / wanted.norm(dim=(-2, -1)))[0]


def within(found: torch.Tensor, limit: float) -> str:
    return "" if found.max() <= limit else f"wrong: relative error {found.max():.2g} is above {limit:g}; not timed"


def as_on_cpu(error: float, on_cpu: float) -> str:
    if abs(error - on_cpu) <= MOST_OTHER_ERROR * on_cpu + ROUNDING:
        return ""
    return f"wrong: the error is {error:.3g}, on the CPU {on_cpu:.3g}; not timed"


def pairs(n: int, causal: bool) -> int:
    return n * (n + 1) // 2 if causal else n * n


def work_of(sets, causal: bool):
    """For exact attention of the sets (batch, n, heads * d): name -> (operations, bytes)."""
    q, k, v = sets[0]
    moved = 2 * q.nbytes + k.nbytes + v.nbytes
    return lambda name: (4 * q.shape[-1] * pairs(q.shape[1], causal), moved)


def prefill_rivals(sets, heads: int, kv_heads: int, device: str, causal: bool) -> dict:
    """What is exact and not ours. MultiHeadAttention has as many kv heads as heads: it gets them repeated."""
    q, dtype = sets[0][0], sets[0][0].dtype

    def repeated(tensor):
        return nodes.heads_of(tensor, kv_heads).repeat_interleave(heads // kv_heads, 1).transpose(1, 2).flatten(2)

    def mha(own_flash=False):
        given = sets if heads == kv_heads else [(q, repeated(k).contiguous(), repeated(v).contiguous()) for q, k, v in sets]
        return nodes.multi_head_attention(given, heads, device, causal, own_flash)

    found = {FLASH: mha}
    if dtype != torch.float32:
        found[OWN_FLASH] = lambda: mha(own_flash=True)
    found["onnxruntime Attention"] = lambda: nodes.onnx_attention(sets, heads, kv_heads, device, causal)
    if causal:
        found[GROUPED] = lambda: nodes.group_query_attention(sets, heads, kv_heads, device)
    backends = {"torch": None} if dtype == torch.float32 or q.device.type == "cpu" else {}
    if dtype != torch.float32:
        backends |= {TORCH: "FLASH_ATTENTION"}
    return found | {
        name: functools.partial(nodes.torch_attention, sets, heads, kv_heads, causal, backend)
        for name, backend in backends.items()
    }


def exact(n: int, size: int, causal: bool, dtype, device: str) -> list[dict]:
    """Exact attention through onnxruntime and through torch, beside theirs."""
    sets, in_cache = prefill_sets(n, size, dtype, device)
    rows = rows_of(n, device)
    wanted = expected(*(nodes.heads_of(tensor, HEADS) for tensor in sets[0]), rows, causal)

    def check(name, contender):
        found = errors(contender.result(), wanted, rows)
        return {"error": float(found.max())}, within(found, LIMITS[dtype])

    attributes = {"strategy": "exact", "is_causal": int(causal)}
    makers = {
        "exact, onnxruntime": lambda: nodes.quantum(sets, HEADS, HEADS, device, **attributes),
        "exact, torch": lambda: nodes.quantum_in_torch(sets, HEADS, HEADS, **attributes),
        **prefill_rivals(sets, HEADS, HEADS, device, causal),
    }
    base = {"n": n, "heads": HEADS, "head_size": size, "causal": causal, "dtype": type_name(dtype), "in_cache": in_cache}
    return compared(makers, check, work_of(sets, causal), PREFILL_RIVALS, base, device)


def prefill_sets(n: int, size: int, dtype, device: str) -> tuple[list, bool]:
    """Gaussian sets of (q, k, v), and whether the device's cache holds all of them."""
    set_bytes = 4 * HEADS * n * size * torch.empty((), dtype=dtype).element_size()
    count = number_of_sets(set_bytes, cache_bytes(device))
    return nodes.random_sets([(1, n, HEADS * size)] * 3, count, dtype, device, n), count * set_bytes < cache_bytes(device)


def tree(data: Activations, n: int, dtype, device: str) -> list[dict]:
    """`tree` at each of DENSITIES beside exact attention. A layer of the model is a set of inputs; errors are over the heads
    of all of them."""
    sets = [tuple(tensor.to(dtype) for tensor in layer) for layer in data.layers(n, device)]
    heads, kv_heads, causal = data.heads, data.kv_heads, data.causal
    rows = rows_of(n, device)
    counts = (heads, kv_heads, kv_heads)
    wanted = [expected(*map(nodes.heads_of, tensors, counts), rows, causal) for tensors in sets]

    def check(name, contender):
        found = torch.cat([errors(contender.result(i), want, rows) for i, want in enumerate(wanted)])
        columns = {"error_mean": float(found.mean()), "error_worst": float(found.max()), "error_on_cpu": None}
        if not name.startswith("tree"):
            return columns, within(found, 2 * LIMITS[sets[0][0].dtype])
        exact_there = float(found.max()) <= 2 * LIMITS[sets[0][0].dtype]  # as a GPU is for inputs that are long for a CPU
        if n > ON_CPU or exact_there:
            return columns, ""
        columns["error_on_cpu"] = on_cpu = float(errors_on_cpu(name).mean())
        return columns, as_on_cpu(columns["error_mean"], on_cpu)

    def errors_on_cpu(name):
        node = nodes.quantum_node(heads, kv_heads, is_causal=int(causal), **settings[name])
        outputs = (nodes.cpu_output(node, dict(zip("qkv", tensors, strict=True)), tensors[0]) for tensors in sets)
        pairs = zip(outputs, wanted, strict=True)
        return torch.cat([errors(nodes.heads_of(y.to(device), heads), want, rows) for y, want in pairs])

    settings = {f"tree 1/{density}": {"strategy": "tree", "num_samples": [n // density]} for density in DENSITIES}
    settings["exact, onnxruntime"] = {"strategy": "exact"}
    makers = {
        name: functools.partial(nodes.quantum, sets, heads, kv_heads, device, is_causal=int(causal), **attributes)
        for name, attributes in settings.items()
    }
    makers |= prefill_rivals(sets, heads, kv_heads, device, causal)
    base = {"data": data.name, "n": n, "layers": len(sets), "heads": heads, "kv_heads": kv_heads}
    base |= {"head_size": sets[0][0].shape[-1] // heads, "causal": causal, "dtype": type_name(sets[0][0].dtype)}
    return compared(makers, check, work_of(sets, causal), PREFILL_RIVALS, base, device)


def strategies(n: int, dtype, device: str) -> list[dict]:
    """The strategies that draw keys for each query, against the CPU's kernels at the same seed, and exact attention."""
    sets, _ = prefill_sets(n, SIZE, dtype, device)
    rows = rows_of(n, device)
    wanted = expected(*(nodes.heads_of(tensor, HEADS) for tensor in sets[0]), rows, False)

    def maker(strategy):
        return lambda: nodes.quantum(sets, HEADS, HEADS, device, strategy=strategy, num_samples=[SAMPLES])

    def check(name, contender):
        output = contender.result()
        error = float(errors(output, wanted, rows).mean())
        if name not in STRATEGIES:
            return {"error": error}, within(errors(output, wanted, rows), LIMITS[dtype])
        node = nodes.quantum_node(HEADS, HEADS, strategy=name, num_samples=[SAMPLES])
        on_cpu = nodes.heads_of(nodes.cpu_output(node, dict(zip("qkv", sets[0], strict=True)), sets[0][0]), HEADS)
        share, on_cpu_error = other_rows(output.cpu(), on_cpu), float(errors(on_cpu.to(device), wanted, rows).mean())
        note = f"wrong: {share:.2%} of the rows are not the CPU's; not timed" if share > MOST_OTHER_ROWS * n else ""
        if name == "hybrid":
            note = as_on_cpu(error, on_cpu_error)
        return {"error": error, "error_on_cpu": on_cpu_error, "other_rows": share}, note

    makers = {name: maker(name) for name in STRATEGIES} | {FLASH: prefill_rivals(sets, HEADS, HEADS, device, False)[FLASH]}
    base = {"n": n, "samples": SAMPLES, "heads": HEADS, "head_size": SIZE, "dtype": type_name(dtype)}
    return compared(makers, check, work_of(sets, False), PREFILL_RIVALS, base, device)


def other_rows(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of the rows (last axis) that are further apart than 16 units of rounding to their type."""
    apart = (found.double() - wanted.double()).norm(dim=-1)
    return float((apart > 16 * torch.finfo(wanted.dtype).eps * wanted.double().norm(dim=-1)).double().mean())


def step(past: int, kv_heads: int, dtype, device: str) -> list[dict]:
    """One new token of HEADS heads over `past` earlier ones, in caches with room for more."""
    set_bytes = 2 * kv_heads * (past + 1) * SIZE * torch.empty((), dtype=dtype).element_size()
    cache = (1, kv_heads, past + 128, SIZE)
    count = number_of_sets(set_bytes, cache_bytes(device))
    sets = nodes.random_sets([(1, HEADS, 1, SIZE), cache, cache], count, dtype, device, past)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    filled = [(q, k[:, :, : past + 1], v[:, :, : past + 1]) for q, k, v in sets]
    wanted = expected(*filled[0], rows, False)

    def check(name, contender):
        found = errors(contender.result(), wanted, rows)
        # The mean of many independent values is small beside its parts, and so is the number of its digits that are right.
        return {"error": float(found.max())}, "" if name.startswith("tree") else within(found, 4 * LIMITS[dtype])

    makers = {
        "exact, onnxruntime": lambda: nodes.quantum_step(sets, device, past, strategy="exact"),
        "exact, torch": lambda: nodes.quantum_step_in_torch(filled),
        "tree 1/16, summary": lambda: nodes.quantum_step(
            sets, device, past, summary=True, strategy="tree", num_samples=[(past + 1) // 16]
        ),
        GROUPED: lambda: nodes.group_query_step(sets, device, past),
        TORCH if device == "cuda" else "torch": lambda: nodes.sdpa(
            filled, False, "FLASH_ATTENTION" if device == "cuda" else None
        ),
    }
    base = {"past": past, "heads": HEADS, "kv_heads": kv_heads, "head_size": SIZE, "dtype": type_name(dtype)}
    flops = 4 * HEADS * SIZE * (past + 1)
    return compared(makers, check, lambda name: (flops, set_bytes), STEP_RIVALS, base, device)


def cases(device: str, quick: bool, packed: list[Activations]) -> list[Case]:
    """All tables of this file, the most telling cases first."""
    half = torch.float16 if device == "cuda" else torch.float32
    exact_cases = QUICK_EXACT if quick else EXACT_CASES
    found = [
        Case(
            "exact",
            f"n {n}, d {size}, {'causal' if causal else 'full'}, {type_name(dtype)}",
            exact,
            (n, size, causal, dtype),
        )
        for n, size, causal, dtype in exact_cases
    ]
    for data in packed:
        for n in (512,) if quick else TREE_LENGTHS:
            found.append(Case("tree", f"{data.name}, n {n}", tree, (data, n, half)))
    found += [
        Case("tree", f"{data.name}, n {FLOAT32_LENGTH}, float32", tree, (data, FLOAT32_LENGTH, torch.float32))
        for data in packed
        if data.name == "minilm" and not quick
    ]
    found += [Case("strategies", f"n {n}", strategies, (n, half)) for n in ((40,) if quick else (512, 4096))]
    steps = ((700, 2),) if quick else ((16384, 8), (65536, 8), (16384, 2), (65536, 2))
    return found + [Case("decode", f"past {past}, {kv} kv heads", step, (past, kv, half)) for past, kv in steps]
