"""docs/figures.md, every figure that was measured, and what the README says of them: from the committed results.

python -m bench.figures writes both files.
"""

import re
from pathlib import Path

from bench import comparisons, summary
from bench.attention import figures as attention
from bench.cuda import figures as cuda
from bench.markdown import load, paragraph, percent, source, table

ROOT = Path(__file__).parents[1]
START, END = "<!-- figures -->\n", "<!-- /figures -->"


def page() -> str:
    """All figures, as Markdown."""
    sections = (
        "# Figures\n",
        "Each table names its machine and the command that makes it again. What the columns mean, and how to read them:\n"
        "[bench/README.md](../bench/README.md). Written by `python -m bench.figures`.\n",
        sts_b(),
        comparisons.training(),
        comparisons.baselines(),
        seed_table(),
        minilm_error(),
        generation(),
        comparisons.scaling(),
        attention.exact(),
        attention.tree(),
        attention.on_tiles(),
        attention.decode(),
        kv_cache(),
        architectures(),
        comparisons.noise(),
        comparisons.compression(),
        attention.goals(),
        cuda.gpu(),
    )
    return "\n".join(part for part in sections if part)


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
    ## A task
    STS-B {parameters["split"]}, {parameters["pairs"]} sentence pairs, all-MiniLM-L6-v2: Spearman × 100 over
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
    ## The table this project started from
    32 queries and keys, 64-D, Gaussian, one head: relative Frobenius error and
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
    ## Trained activations
    The {parameters["heads"]} heads of MiniLM on {parameters["texts"]} film reviews of 512 tokens,
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
    ## Speech and stories
    Whisper tiny.en on ten seconds of speech, all 12 attentions over up to 1500 positions sampled:
    error of the encoder's states, and share of the transcript's tokens that stay the most likely. stories15M on its own
    greedy text of {parameters["story_tokens"]} tokens: nats per token. {parameters["seeds"]} seeds
    {source("generation", results)}.
    """) + table(header, rows)


def kv_cache() -> str:
    results = load("kv_cache")
    story = {row["past"]: f"{row['tokens_per_s']:.0f}" for row in results["story"]}
    rows = [
        (row["past"], *(f"{row[f'{name}_ms']:.1f} ms" for name in ("in place", "tree", "fallback", "joined")))
        for row in results["steps"]
    ]
    header = ("past", "exact", "tree, 512 keys", "no library", "past joined")
    return paragraph(f"""
    ## Token by token
    stories15M's own greedy text of {results["parameters"]["new_tokens"]} tokens, per second:
    {story["in place"]} with a cache that is appended in place and exact attention, {story["joined"]} when onnxruntime's
    Attention joins past and new keys, {story["without"]} without a cache. One step of a Llama of the same sizes behind a
    longer past: caches in place with the library (exact, and the tree with summaries, whose error docs/math.md tells) and
    without it, and joined {source("kv_cache", results)}.
    """) + table(header, rows)


# What the reasons of `convert` are in a few words; names of nodes and what follows a semicolon are dropped from the others.
FEW_WORDS = (
    (r"torch cannot export .* complex-.*", "torch cannot export complex numbers"),
    (r"torch cannot export .* GuardOnDataDependentSymNode.*", "torch cannot export what it does depending on values"),
    (r"torch cannot export the model to ONNX: (\w+).*", r"torch cannot export it (\1)"),
    (r".* takes '(\w+)', for which no example inputs are known.*", r"no example inputs are known for \1"),
    (r".* does not run on example inputs.*", "does not run on the example inputs: give package.module:callable"),
    (r"no attention found.*", "no softmax between two products of matrices"),
    (r".*onnxruntime \S+ has no kernel here for (\w+).*", r"onnxruntime has no kernel for its \1"),
    (r"(the classical ONNX model differs from the source) by.*", r"\1"),
    (r"none of its \d+ attentions can be converted; [^:]+: (.*)", r"\1"),
    (r"( in)? '[^']*'", ""),
    (r"; .*", ""),
)


def architectures() -> str:
    results = load("architectures")
    rows, versions = results["architectures"], results["parameters"]
    whole = [row for row in rows if row["difference"] is not None and not row["left_alone"]]
    kinds, others = {}, {}
    for row in whole:
        kinds.setdefault(row["kind"], []).append(row["type"])
    for row in (row for row in rows if row not in whole):
        words = row["reason"]
        for pattern, few in FEW_WORDS:
            words = re.sub(pattern, few, words)
        converted = f"{row['converted']} of {row['converted'] + row['left_alone']}" if row["converted"] else "none"
        others.setdefault((words, converted), []).append(row["type"])
    notes = {}
    for row in whole:
        if row["notes"]:
            notes.setdefault(row["notes"], []).append(row["type"])
    remarks = " ".join(f"{', '.join(types)}: {note.removeprefix('its ')}." for note, types in notes.items())
    later = versions.get("later")  # types that were run again, elsewhere
    machines = f"; {', '.join(later['types'])} on an {later['cpu']}" if later else ""
    compared = sorted((row["difference"], row["type"]) for row in rows if row["difference"] is not None)
    first = paragraph(f"""
    ## Model types that convert takes
    {len(rows)} model types of transformers {versions["transformers"]}, exported by torch {versions["torch"]}, each as a tiny
    model of {versions["layers"]} layers with random weights and converted with strategy exact: {len(whole)} convert in every
    attention. At another batch and length, with padding, with the op library and without, outputs differ from torch's eager
    attention by {compared[len(compared) // 2][0]:.0e} of the largest value in the median, and by {compared[-1][0]:.0e} in
    {compared[-1][1]} {source("architectures", results)}{machines}.
    """)
    taken = table(
        ("every attention converts", "types", "names"),
        [(kind, len(types), ", ".join(types)) for kind, types in kinds.items()],
        words=True,
    )
    left = table(
        ("not every attention converts", "converted", "why"),
        [(", ".join(types), converted, words) for (words, converted), types in others.items()],
        words=True,
    )
    return first + taken + "\n" + paragraph(remarks) + left


def put(text: str, figures: str) -> str:
    """`text` with the figures between its markers; ValueError when it has none."""
    before, found, rest = text.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"no {START.strip()} ... {END} in the text")
    return f"{before}{START}\n{figures}\n{END}{after}"


def main():
    (ROOT / "docs" / "figures.md").write_text(page(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(put(readme.read_text(encoding="utf-8"), summary.markdown()), encoding="utf-8")


if __name__ == "__main__":
    main()
