"""What the README says of the figures: an answer to each question a reader has, and the goals that were missed."""

from bench.attention.goals import judged, matches
from bench.markdown import RESULTS, load, paragraph, percent, table, times


def markdown() -> str:
    """The answers and the missed goals, as Markdown, from the committed results."""
    results = load("attention")
    goals = judged(results, results["parameters"]["isa"])
    return "\n".join((_answers({goal["goal"]: goal["measured"] for goal in goals}), _missed(goals)))


def _answers(goals: dict[str, float]) -> str:
    def loss(task: str) -> str:
        return f"{goals[f'{task}, default recipe: relative loss in percent']:.2f} %"

    def ratio(goal: str) -> str:
        return f"{goals[goal]:.3g} ×"

    def never_slower(what: str) -> str:
        return ratio(f"{what}, never slower than MultiHeadAttention, any n")

    def decode(what: str) -> str:
        return ratio(f"decode at 16k past, {what}")

    whole = ratio("default recipe, never slower than the classical model, 8 to 512 tokens, whole models")
    models = len({row["model"] for row in load("lengths")["lengths"]})
    minilm = {row["contender"]: row for row in load("compress")["minilm"]}["compress 8x"]
    answers = [
        (
            "What does the default lose?",
            f"STS-B {loss('STS-B')}, film reviews {loss('classifier of film reviews of 512 tokens')}, perplexity of stories "
            f"{loss('perplexity of stories')} (below zero: a gain)",
            "A task",
        ),
        (
            "Is attention faster on a CPU?",
            f"the default {never_slower('default recipe')} or more; `exact` in float32 {never_slower('exact fp32')} or "
            f"more, and causal from 2048 tokens on {ratio('exact fp32, causal, against MultiHeadAttention, n >= 2048')}",
            "Without sampling",
        ),
        ("And on a Xeon with AMX?", _tiles(), "On a Xeon with AMX"),
        (
            "And a whole model?",
            f"about as fast as before on short inputs: the slowest of {models} models and 8 to 512 tokens {whole}, MiniLM "
            f"at {_longest_minilm()}",
            "Other approximations in the same model",
        ),
        (
            "What do fewer keys give?",
            f"{_tree()}; the strategies that draw keys for each query save no time",
            "Speed and error on trained activations",
        ),
        (
            "And token by token?",
            f"behind 16384 tokens `exact` {decode('exact, against MultiHeadAttention with past')}; {_tree_step()}; `exact` "
            f"against GroupQueryAttention {times(_exact_step())} (slower)",
            "Decoding",
        ),
        (
            "How small do weights get?",
            f"MiniLM {minilm['ratio']:.2f} times smaller, with a loss of {minilm['spearman_loss_percent']:.2f} % on STS-B",
            "Smaller weights",
        ),
    ]
    if (RESULTS / "cuda.json").is_file():
        answers.append(("Is it faster on a GPU?", _gpu(), "On a GPU"))
    rows = [(question, answer, f"[{title}](docs/figures.md#{_anchor(title)})") for question, answer, title in answers]
    return table(("question", "measured", "table"), rows, words=True)


def _anchor(title: str) -> str:
    """The place of a heading in its page, as GitHub names it."""
    return title.lower().replace(" ", "-")


def _tree() -> str:
    """What fewer keys are worth on MiniLM's activations: a budget with a mean error of 10 %, and a tolerance of 10 %."""
    found = [row for row in load("attention")["activations"] if row["contender"].startswith("tree")]
    lengths = (2048, 4096, 16384)
    at = {n: [row for row in found if row["data"] == f"minilm-{n}"] for n in lengths}
    kept = [row for n in lengths for row in at[n] if row["contender"] == "tree, tolerance 0.1"]
    return (
        f"on trained activations `tree` with a mean error of 10 % or less {', '.join(_fastest(at[n]) for n in lengths)}; "
        f"with `--error-tolerance 10%` {', '.join(times(row['x_mha']) for row in kept)} "
        f"(worst heads {', '.join(percent(row['error_worst']) for row in kept)})"
    )


def _fastest(rows: list[dict]) -> str:
    """The fastest of those with a mean error of 10 % or less."""
    best = max((row for row in rows if row["error_mean"] <= 0.1), key=lambda row: row["x_mha"])
    return f"{times(best['x_mha'])} at {best['n']} tokens (worst head {percent(best['error_worst'])})"


def _tree_step() -> str:
    """What a step from a summary is worth on stories15M: a budget, and a tolerance of 10 %."""
    rows = [row for row in load("attention")["decode"] if row["data"] == "stories" and row["past"] == 16384]
    rows = [row for row in rows if row["threads"] == 1 and row["contender"].startswith("tree")]
    best = max(rows, key=lambda row: row["x_mha"])
    kept = next(row for row in rows if row["contender"] == "tree, tolerance 0.1, static cache")
    return (
        f"`tree` on trained activations {times(best['x_mha'])}, against GroupQueryAttention {times(best['x_gqa'])} (mean "
        f"error {percent(best['error_mean'])}, worst head {percent(best['error_worst'])}), with "
        f"`--error-tolerance 10%` {times(kept['x_mha'])} and {times(kept['x_gqa'])}"
    )


def _exact_step() -> float:
    """How many times as long GroupQueryAttention takes as our exact step behind 16384 tokens, at the least."""
    step = {"contender": "exact fp32, static cache", "past": 16384, "data": "gaussian"}
    return min(row["x_gqa"] for row in load("attention")["decode"] if matches(row, step))


def _tiles() -> str:
    """What the default and float32 are worth there, against MultiHeadAttention."""

    def least(contender: str, causal: bool, n: int) -> str:
        rows = [row for row in load("attention_amx")["prefill"] if row["contender"] == contender]
        return times(min(row["x_mha"] for row in rows if row["causal"] == causal and row["n"] >= n))

    return (
        f"the default {least('default', False, 0)} or more, from 2048 tokens on {least('default', False, 2048)}, and causal "
        f"{least('default', True, 2048)}; `exact` in float32 {least('exact fp32', False, 0)} or more (at times slower)"
    )


def _longest_minilm() -> str:
    runs = [row for row in load("baselines")["runs"] if row["attention"] == "default"]
    longest = max(runs, key=lambda row: row["n"])
    return f"{longest['n']} tokens {times(longest['x_classical'])}"


def _gpu() -> str:
    results = load("cuda")
    exact = [row for row in results["exact"] if row["contender"] == "exact, onnxruntime" and row["dtype"] == "float16"]
    best: dict[tuple, dict] = {}  # the fastest of those with a mean error of 10 % or less
    for row in results["tree"]:
        if row["contender"].startswith("tree") and row["dtype"] == "float16" and row["error_mean"] <= 0.1:
            place = row["n"], row["data"]
            best[place] = max(best.get(place, row), row, key=lambda row: row["x_flash"])

    def span(ratios: list[float]) -> str:
        return f"{min(ratios):.2f} to {max(ratios):.2f} ×"

    def exact_span(column: str, long: bool) -> str:
        return span([row[column] for row in exact if (row["n"] > 4096) == long and row[column] is not None])

    slower = sorted({row["n"] for row in exact if (row["x_flash"] or 1) < 1})
    at = f", slower at {' and '.join(map(str, slower))}" if slower else ""

    def tree(n: int) -> str:
        rows = [row for (m, _), row in best.items() if m == n]
        worst = percent(max(row["error_worst"] for row in rows))
        return f"{span([row['x_flash'] for row in rows])} at {n} tokens (worst head {worst})"

    return (
        f"{results['parameters']['card']}, float16, where MultiHeadAttention is cuDNN's: `tree` with a mean error of 10 % "
        f"or less {tree(16384)}, {tree(65536)}; `exact` {exact_span('x_flash', False)} up to 4096 tokens{at}, and "
        f"{exact_span('x_flash', True)} from 16384 on. Against onnxruntime's own flash kernel `exact` is "
        f"{exact_span('x_own_flash', False)} and {exact_span('x_own_flash', True)}"
    )


def _missed(goals: list[dict]) -> str:
    met, missed = ([goal for goal in goals if goal["verdict"] == verdict] for verdict in ("met", "missed"))
    rows = [(goal["goal"], goal["limit"], f"{goal['measured']:.3g}") for goal in missed]
    return paragraph(f"""
    {len(met)} of {len(met) + len(missed)} [goals](docs/figures.md#goals) are met. These are missed:
    """) + table(("goal", "limit", "measured"), rows)
