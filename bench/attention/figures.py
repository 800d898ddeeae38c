"""The figures of attention on CPUs, and every goal that is not a GPU's."""

from bench.attention.goals import judged
from bench.markdown import load, paragraph, source, table, times


def exact() -> str:
    results = load("attention")
    return paragraph(f"""
    ## Without sampling
    Strategy `exact` on heads of 64 ({results["parameters"]["isa"]}): median time in float32, and how
    many times as long onnxruntime's MultiHeadAttention and Attention and torch's scaled_dot_product_attention take on the
    same inputs, calls interleaved; under bf16, int8 and default how many times as long MultiHeadAttention takes as that
    precision, or as the recipe that `convert` takes without a word {source("attention", results)}.
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
            times(found["default"]["x_mha"]),
        )
        for (causal, threads, n), found in by_place.items()
        if n in (128, 512, 2048, 4096, 16384)
    ]
    return table(
        ("n", "", "threads", "fp32", "MultiHeadAttention", "Attention", "torch SDPA", "bf16", "int8", "default"), rows
    )


def tree() -> str:
    results = load("attention")
    return paragraph(f"""
    ## Speed and error on trained activations
    All heads of a model in one call, relative error of a head's output, mean and
    worst head, and how many times as long MultiHeadAttention takes (clustering counted). `tree 1/8` reads an eighth of the
    keys exactly. Performer and Linformer come from their packages with random features and projections, since these heads
    were trained without them; top-k and uniform sampling are torch programs {source("attention", results)}.
    """) + _tree_table(results)


def _tree_table(results: dict) -> str:
    shown = (
        "default",
        "exact bf16",
        "tree 1/32",
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
        if row["data"] in ("minilm-2048", "minilm-4096", "minilm-16384", "whisper-1500") and row["contender"] in shown
    ]
    return table(("activations", "attention", "mean", "worst head", "time", "MultiHeadAttention"), rows)


def decode() -> str:
    results = load("attention")
    pasts = {"gaussian": (1024, 16384, 65536), "stories": (16384,)}
    shown = [row for row in results["decode"] if row["past"] in pasts.get(row["data"], ())]
    most = max(row["threads"] for row in shown)
    alone = {(row["data"], row["past"], row["contender"]): row for row in shown if row["threads"] == 1}
    rows = []
    for row in shown:
        if row["threads"] == most:
            one = alone[row["data"], row["past"], row["contender"]]
            rows.append(
                (
                    f"{row['past'] // 1024}k, {row['data']}",
                    row["contender"],
                    f"{row['ms']:.3g} ms",
                    *(f"{one[x]:.2f}, {times(row[x])}" if row[x] else "" for x in ("x_mha", "x_gqa")),
                    f"{row['percent_of_bandwidth']:.0f} %" if row["percent_of_bandwidth"] else "",
                    *(f"{100 * row[x]:.3g} %" if row[x] > 1e-5 else f"{row[x]:.0e}" for x in ("error_mean", "error_worst")),
                )
            )
    header = ("past", "attention", "time", "MultiHeadAttention", "GroupQueryAttention", "of the bandwidth")
    return paragraph(f"""
    ## Decoding
    One new token over a past, 8 heads of 64 on Gaussian keys, where no sample of the keys can be good, or the 6 heads of 48
    of a middle layer of stories15M: the time on {most} threads; how many times as long MultiHeadAttention with past and
    GroupQueryAttention with a shared buffer take, on 1 thread and on {most}; what reading the cache once at the measured
    speed of the memory would be of the time; relative error of a head, mean and worst {source("attention", results)}.
    """) + table((*header, "mean", "worst head"), rows)


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
    From `bench/goals.toml`, each with what decides it, on the machines of the tables above and below.
    """) + table(("goal", "limit", "measured", "", "where"), rows)
