"""The README's figures, from the committed results: prints them, or with --write puts them between the README's markers.

python -m bench.figures [--write README.md]
"""

import argparse
from pathlib import Path

from bench import comparisons
from bench.attention.goals import judged
from bench.cuda import figures as cuda
from bench.markdown import load, paragraph, percent, source, table, times

START, END = "<!-- figures -->\n", "<!-- /figures -->"


def markdown() -> str:
    """All figures, as Markdown."""
    sections = (sts_b(), comparisons.training(), comparisons.baselines(), seed_table(), minilm_error())
    sections += (
        generation(),
        comparisons.scaling(),
        attention(),
        kv_cache(),
        comparisons.noise(),
        comparisons.compression(),
        cuda.section(),
    )
    return "\n".join(section for section in sections if section)


def sts_b() -> str:
    results = load("sts_b")
    kept = [
        row
        for row in results["spearman"]
        if row["strategy"] in ("classical", "default", "stratified", "naive") and row["control_variate"] != 0
    ]
    rows = [
        (
            row["strategy"] + (f", {row['samples']} samples" if row["samples"] else ""),
            f"{row['spearman_x100']:.2f}" + (f" ± {row['ci95']:.2f}" if row["ci95"] is not None else ""),
            f"{row['loss_percent']:.2f} %",
            f"{row['sampled_sentences_percent']:.0f} %" if row["sampled_sentences_percent"] is not None else "",
        )
        for row in kept
    ]
    parameters = results["parameters"]
    return paragraph(f"""
    **A task.** STS-B {parameters["split"]}, {parameters["pairs"]} sentence pairs, all-MiniLM-L6-v2: Spearman × 100 over
    {parameters["seeds"]} seeds with the 95 % interval, and the loss relative to the classical model
    {source("sts_b", results)}. Sentences average {parameters["mean_tokens"]:.0f} tokens: the last column is the share
    that is longer than the samples, all others are computed exactly.
    """) + table(("attention", "Spearman × 100", "loss", "sampled"), rows)


def seed_table() -> str:
    results = load("seed_table")
    op = [
        (
            row["strategy"],
            row["samples"],
            percent(row["error"]),
            percent(row["claimed_error"]) if row["claimed_error"] else "",
            f"{1e3 * row['p50_ms']:.0f} µs",
            f"{row['claimed_ms']} ms" if row["claimed_ms"] else "",
        )
        for row in results["op"]
        if row["samples"]
    ]
    layer = {(row["attention"], row["samples"]): row for row in results["layer"]}
    standard, sampled = layer["standard", None], layer["stratified", 32]
    found = {(row["n"], row["strategy"]): row for row in results["gaussian"]}
    bounds = ", ".join(
        f"n = {n}: {percent(row['error'])} against {percent(row['bound'])} ({percent(found[n, 'hybrid']['error'])})"
        for (n, strategy), row in found.items()
        if strategy == "stratified"
    )
    first = paragraph(f"""
    **The table this project started from.** 32 queries and keys, 64-D, Gaussian, one head: relative Frobenius error and
    median latency of the op in a session, beside the original claims {source("seed_table", results)}. With a sample per key
    nothing is left to estimate; sampling starts below.
    """)
    modules = {(row["module"], row["n"], row["weights"]): row for row in results["module"]}
    times = "; ".join(
        f"n = {n}: {ours['x_torch']:.2f} and {modules[name, n, False]['x_torch']:.2f} ×"
        for (name, n, weights), ours in modules.items()
        if weights and name == "QuantumMultiheadAttention"
    )
    called = {name: modules[f"{name}MultiheadAttention", 32, True] for name in ("nn.", "Quantum")}
    torch_module = paragraph(f"""
    The same layer as a torch module: {called["nn."]["p50_ms"]:.2f} ms with nn.MultiheadAttention,
    {called["Quantum"]["p50_ms"]:.2f} ms with QuantumMultiheadAttention and its defaults (claimed
    {called["nn."]["claimed_ms"]} and {called["Quantum"]["claimed_ms"]}), error {percent(called["Quantum"]["error"])}
    (claimed {percent(called["Quantum"]["claimed_error"])}). How many times as long torch's module takes,
    with and without the attention weights as a second output: {times}.
    """)
    last = paragraph(f"""
    A 512-D layer of 8 heads at length 32: {standard["p50_ms"]:.2f} ms with standard attention (claimed
    {standard["claimed_ms"]}), {sampled["p50_ms"]:.2f} ms with 32 samples (claimed {sampled["claimed_ms"]}), error
    {percent(sampled["error"])} (claimed {percent(sampled["claimed_error"])}). Gaussian inputs are the hardest: the error
    of `stratified` with 32 samples, against the least that any estimator could reach by reading 32 values and nothing else
    (in brackets `hybrid`, whose means of clusters hold all of them), is {bounds}.
    """)
    return (
        first
        + table(("strategy", "samples", "error", "claimed", "p50", "claimed"), op)
        + "\n"
        + last
        + torch_module.rstrip("\n")
        + "\n"
    )


def minilm_error() -> str:
    results = load("minilm_error")
    rows = [
        (
            row["strategy"],
            row["samples"],
            f"{row['mean_percent']:.1f} %",
            f"{row['worst_percent']:.0f} %",
            f"{row['cosine']:.4f}",
        )
        for row in results["n512"]
        if row["control_variate"] == 1 and row["samples"] in (32, 128)
    ]
    parameters = results["parameters"]
    return paragraph(f"""
    **Trained activations.** The {parameters["heads"]} heads of MiniLM on {parameters["texts"]} film reviews of 512 tokens,
    {parameters["draws"]} draws: relative Frobenius error of a head's output, mean and worst head, and the cosine of the
    pooled embedding when all six attentions are sampled {source("minilm_error", results)}.
    """) + table(("strategy", "samples", "mean", "worst head", "cosine"), rows)


def generation() -> str:
    results = load("generation")
    speech = {row["samples"]: row for row in results["speech"]}
    story = {row["samples"]: row for row in results["story"]}
    rows = [
        (
            samples or "all",
            f"{100 * speech[samples]['encoder_error']:.1f} %" if samples else "",
            f"{100 * speech[samples]['same_tokens']:.0f} %",
            f"{story[samples]['nats_per_token']:.3f}",
        )
        for samples in (None, 64, 32, 16, 8)
    ]
    parameters = results["parameters"]
    header = ("keys read per query", "encoder error", "same tokens", "story, nats per token")
    return paragraph(f"""
    **Speech and stories.** Whisper tiny.en on ten seconds of speech, all 12 attentions over up to 1500 positions sampled:
    error of the encoder's states, and share of the transcript's tokens that stay the most likely. stories15M on its own
    greedy text of {parameters["story_tokens"]} tokens: nats per token. {parameters["seeds"]} seeds
    {source("generation", results)}.
    """) + table(header, rows)


def attention() -> str:
    results = load("attention")
    parts = (_exact(results), _tree(results), _decode(results), _goals(results))
    return "\n".join(parts)


def _exact(results: dict) -> str:
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
            times(found["exact int8"]["x_mha"]),
        )
        for (causal, threads, n), found in by_place.items()
        if n in (128, 512, 2048, 4096, 16384)
    ]
    header = ("n", "", "threads", "fp32", "MultiHeadAttention", "Attention", "torch SDPA", "bf16", "int8")
    return paragraph(f"""
    **Without sampling.** Strategy `exact` on heads of 64 ({results["parameters"]["isa"]}): median time in float32, and how
    many times as long onnxruntime's MultiHeadAttention and Attention and torch's scaled_dot_product_attention take on the
    same inputs, calls interleaved; under bf16 and int8 how many times as long MultiHeadAttention takes as that precision
    {source("attention", results)}.
    """) + table(header, rows)


def _tree(results: dict) -> str:
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
    return paragraph("""
    **Speed and error on trained activations**: all heads of a model in one call, relative error of a head's output, mean and
    worst head, and how many times as long MultiHeadAttention takes (clustering counted). `tree 1/8` reads an eighth of the
    keys exactly. Performer and Linformer come from their packages with random features and projections, since these heads
    were trained without them; top-k and uniform sampling are torch programs.
    """) + table(("activations", "attention", "mean", "worst head", "time", "MultiHeadAttention"), rows)


def _decode(results: dict) -> str:
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
    **Decoding**: one new token over a past, 8 heads of 64, {most} threads; how many times as long MultiHeadAttention with
    past and GroupQueryAttention with a shared buffer take, and what reading the cache once at the measured speed of the
    memory would be of the time.
    """) + table(header, rows)


def _goals(results: dict) -> str:
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
    **Goals** (`bench/goals.toml`), each with what decides it.
    """) + table(("goal", "limit", "measured", "", "where"), rows)


def kv_cache() -> str:
    results = load("kv_cache")
    story = {row["past"]: f"{row['tokens_per_s']:.0f}" for row in results["story"]}
    rows = [
        (row["past"], *(f"{row[f'{name}_ms']:.1f} ms" for name in ("in place", "tree", "fallback", "joined")))
        for row in results["steps"]
    ]
    header = ("past", "exact", "tree, 512 keys", "no library", "past joined")
    return paragraph(f"""
    **Token by token.** stories15M's own greedy text of {results["parameters"]["new_tokens"]} tokens, per second:
    {story["in place"]} with a cache that is appended in place and exact attention, {story["joined"]} when onnxruntime's
    Attention joins past and new keys, {story["without"]} without a cache. One step of a Llama of the same sizes behind a
    longer past: caches in place with the library (exact, and the tree with summaries, whose error docs/math.md tells) and
    without it, and joined {source("kv_cache", results)}.
    """) + table(header, rows)


def put(text: str, figures: str) -> str:
    """`text` with the figures between its markers; ValueError when it has none."""
    before, found, rest = text.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"no {START.strip()} ... {END} in the text")
    return f"{before}{START}\n{figures}\n{END}{after}"


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--write", metavar="FILE", type=Path, help="put the figures into this file")
    file = arguments.parse_args().write
    if file is None:
        print(markdown())
    else:
        file.write_text(put(file.read_text(encoding="utf-8"), markdown()), encoding="utf-8")


if __name__ == "__main__":
    main()
