"""The figures of attention on CPUs, and every goal that is not a GPU's."""

from bench.attention.goals import judged
from bench.markdown import load, paragraph, source, table, times


def exact() -> str:
    results = load("attention")
    return paragraph(f"""
    ## Without sampling
    Strategy `exact` on heads of 64 ({results["parameters"]["isa"]}): median time in float32, and how
    many times as long onnxruntime's MultiHeadAttention and Attention and torch's scaled_dot_product_attention take on the
    same inputs, calls interleaved; under bf16 and int8 how many times as long MultiHeadAttention takes as that precision
    {source("attention", results)}.
    """) + _exact_table(results)


def on_tiles() -> str:
    """The same benchmark on a processor with AMX: both tables, and the goals that it misses there."""
    results = load("attention_amx")
    missed = [
        f"{row['goal']} ({row['limit']}): {row['measured']:.3g}"
        for row in results["goals"]
        if row["verdict"] == "missed" and row["command"] == "python -m bench.attention"
    ]
    return (
        paragraph(f"""
        ## On a Xeon with AMX
        Both tables above once more, where products of bfloat16 are made by tiles ([cpu.md](cpu.md)) and `int8` is computed
        so too {source("attention", results)}.
        """)
        + _exact_table(results)
        + "\n"
        + _tree_table(results)
        + "\n"
        + f"Goals missed there: {'; '.join(missed) or 'none'}.\n"
    )


def _exact_table(results: dict) -> str:
    by_place = {}
    for row in results["prefill"]:
        by_place.setdefault((row["causal"], row["threads"], row["n"]), {})[row["contender"]] = row
    rows = [
        (
            n,
            "causal" if causal else "",
            threads,
            f"{found['exact fp32']['ms']:.3g} ms",
            times(found["exact fp32"]["x_mha"]),
            times(found["exact fp32, 4-D"]["x_attention"]),
            times(found["exact fp32, 4-D"]["x_sdpa"]),
            times(found["exact bf16"]["x_mha"]),
            times(found.get("exact int8", {}).get("x_mha")),
        )
        for (causal, threads, n), found in by_place.items()
        if n in (128, 512, 2048, 4096, 16384)
    ]
    return table(("n", "", "threads", "fp32", "MultiHeadAttention", "Attention", "torch SDPA", "bf16", "int8"), rows)


def tree() -> str:
    return paragraph("""
    ## Speed and error on trained activations
    All heads of a model in one call, relative error of a head's output, mean and
    worst head, and how many times as long MultiHeadAttention takes (clustering counted). `tree 1/8` reads an eighth of the
    keys exactly. Performer and Linformer come from their packages with random features and projections, since these heads
    were trained without them; top-k and uniform sampling are torch programs.
    """) + _tree_table(load("attention"))


def _tree_table(results: dict) -> str:
    shown = (
        "default",
        "exact bf16",
        "tree 1/16",
        "tree 1/8",
        "tree 1/4",
        "tree, tolerance 0.1",
        "stratified 64",
        "top 64 and mean V",
    )
    shown += ("uniform 1/2", "Performer", "Linformer 256")
    rows = [
        (
            row["data"],
            row["contender"],
            f"{100 * row['error_mean']:.2g} %",
            f"{100 * row['error_worst']:.2g} %",
            f"{row['ms']:.3g} ms",
            times(row["x_mha"]),
        )
        for row in results["activations"]
        if row["data"] in ("minilm-2048", "minilm-4096", "whisper-1500") and row["contender"] in shown
    ]
    return table(("activations", "attention", "mean", "worst head", "time", "MultiHeadAttention"), rows)


def decode() -> str:
    results = load("attention")
    most = max(row["threads"] for row in results["decode"])
    rows = [
        (
            f"{row['past'] // 1024}k",
            row["contender"],
            f"{row['ms']:.3g} ms",
            times(row["x_mha"]),
            times(row["x_gqa"]),
            f"{row['percent_of_bandwidth']:.0f} %" if row["percent_of_bandwidth"] else "",
        )
        for row in results["decode"]
        if row["threads"] == most and row["past"] in (1024, 16384, 65536) and row["data"] == "gaussian"
    ]
    header = ("past", "attention", "time", "MultiHeadAttention", "GroupQueryAttention", "of the bandwidth")
    return paragraph(f"""
    ## Decoding
    One new token over a past, 8 heads of 64, {most} threads; how many times as long MultiHeadAttention with
    past and GroupQueryAttention with a shared buffer take, and what reading the cache once at the measured speed of the
    memory would be of the time.
    """) + table(header, rows)


def goals() -> str:
    results = load("attention")
    rows = [
        (
            row["goal"],
            row["limit"],
            f"{row['measured']:.3g}" if row["measured"] is not None else "",
            row["verdict"],
            row["decided_by"],
        )
        for row in judged(results, results["parameters"]["isa"])
        if row["command"] != "python -m bench.cuda"  # a GPU has its own table
    ]
    return paragraph("""
    ## Goals
    From `bench/goals.toml`, each with what decides it.
    """) + table(("goal", "limit", "measured", "", "where"), rows)
