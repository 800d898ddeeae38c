"""What the README says of the figures: an answer to each question a reader has, and the goals that were missed."""

from bench.attention.goals import judged, matches
from bench.markdown import RESULTS, load, paragraph, table, times


def markdown() -> str:
    """The answers and the missed goals, as Markdown, from the committed results."""
    goals = _goals()
    return "\n".join((_answers({goal["goal"]: goal["measured"] for goal in goals}), _missed(goals)))


def _goals() -> list[dict]:
    results = load("attention")
    found = [g for g in judged(results, results["parameters"]["isa"]) if g["command"] != "python -m bench.cuda"]
    return found + (load("cuda")["goals"] if (RESULTS / "cuda.json").is_file() else [])


def _answers(goals: dict[str, float]) -> str:
    def loss(task: str) -> str:
        return f"{goals[f'{task}, default recipe: relative loss in percent']:.2f} %"

    def ratio(goal: str) -> str:
        return f"{goals[goal]:.3g} ×"

    def never_slower(what: str) -> str:
        return ratio(f"{what}, never slower than MultiHeadAttention, any n")

    def decode(what: str) -> str:
        return ratio(f"decode at 16k past, {what}")

    lengths = (512, 2048, 4096, 16384)
    tree = [f"{ratio(f'tree at <= 10 %, whole op, against MultiHeadAttention, n = {n}')} at {n}" for n in lengths]
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
            f"`tree` at 10 % of error or less, on trained activations: {', '.join(tree)} tokens; the strategies that draw "
            "keys for each query save no time",
            "Speed and error on trained activations",
        ),
        (
            "And token by token?",
            f"behind 16384 tokens `exact` {decode('exact, against MultiHeadAttention with past')}, `tree` at 10 % or less "
            f"{decode('<= 10 %, against MultiHeadAttention with past')}; against GroupQueryAttention {times(_exact_step())} "
            f"(slower) and {decode('<= 10 %, against GroupQueryAttention, shared buffer')}",
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


def _exact_step() -> float:
    """How many times as long GroupQueryAttention takes as our exact step behind 16384 tokens, at the least."""
    step = {"contender": "exact fp32, static cache", "past": 16384, "data": "gaussian"}
    return min(row["x_gqa"] for row in load("attention")["decode"] if matches(row, step))


def _tiles() -> str:
    """What the default is worth there, against MultiHeadAttention."""
    rows = [row for row in load("attention_amx")["prefill"] if row["contender"] == "default"]

    def least(causal: bool, n: int) -> str:
        return times(min(row["x_mha"] for row in rows if row["causal"] == causal and row["n"] >= n))

    return f"the default {least(False, 0)} or more, from 2048 tokens on {least(False, 2048)}, and causal {least(True, 2048)}"


def _longest_minilm() -> str:
    runs = [row for row in load("baselines")["runs"] if row["attention"] == "default"]
    longest = max(runs, key=lambda row: row["n"])
    return f"{longest['n']} tokens {times(longest['x_classical'])}"


def _gpu() -> str:
    results = load("cuda")
    exact = [row for row in results["exact"] if row["contender"] == "exact, onnxruntime" and row["dtype"] == "float16"]
    found = {}
    for row in results["tree"]:
        if row["contender"].startswith("tree") and row["dtype"] == "float16" and row["error_mean"] <= 0.1:
            place = row["n"], row["data"]
            found[place] = max(found.get(place, 0), row["x_flash"])

    def span(ratios: list[float]) -> str:
        return f"{min(ratios):.2f} to {max(ratios):.2f} ×"

    def exact_span(column: str, long: bool) -> str:
        return span([row[column] for row in exact if (row["n"] > 4096) == long and row[column] is not None])

    slower = sorted({row["n"] for row in exact if (row["x_flash"] or 1) < 1})
    at = f", slower at {' and '.join(map(str, slower))}" if slower else ""
    tree = [f"{span([x for (m, _), x in found.items() if m == n])} at {n}" for n in (16384, 65536)]
    return (
        f"{results['parameters']['card']}, float16, where MultiHeadAttention is cuDNN's: `tree` at 10 % or less "
        f"{', '.join(tree)} tokens; `exact` {exact_span('x_flash', False)} up to 4096 tokens{at}, and "
        f"{exact_span('x_flash', True)} from 16384 on. Against onnxruntime's own flash kernel `exact` is "
        f"{exact_span('x_own_flash', False)} and {exact_span('x_own_flash', True)}"
    )


def _missed(goals: list[dict]) -> str:
    met, missed = ([goal for goal in goals if goal["verdict"] == verdict] for verdict in ("met", "missed"))
    rows = [(goal["goal"], goal["limit"], f"{goal['measured']:.3g}") for goal in missed]
    return paragraph(f"""
    {len(met)} of {len(met) + len(missed)} [goals](docs/figures.md#goals) are met. These are missed:
    """) + table(("goal", "limit", "measured"), rows)
