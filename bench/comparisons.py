"""The figures on other approximations of attention: in a real model, and against the length; on training; and on
noise beside other packages."""

from bench.markdown import load, paragraph, source, table, times
from qexport.words import percent


def training() -> str:
    results = load("training")
    rows = [
        (
            row["attention"],
            f"{row['read_percent']:.3g} %",
            f"{row['accuracy_percent']:.2f} % ± {row['ci95']:.2f}",
            f"{row['loss_percent']:.2f} % ± {row['loss_ci95']:.2f}" if row["loss_ci95"] else "",
            f"{row['step_ms']:.0f} ms",
        )
        for row in results["training"]
    ]
    parameters = results["parameters"]
    return paragraph(f"""
    ## Trained with sampling
    A classifier of film reviews by two encoder layers, trained on {parameters["reviews"]} reviews
    of {parameters["tokens"]} tokens and judged on {parameters["judged"]} others with the attention that it was trained with:
    keys read, accuracy, what is lost relative to the classical one (mean of {parameters["seeds"]} seeds, pairs of equal
    seed, 95 % intervals) and processor time of a training step of {parameters["batch"]} {source("training", results)}.
    """) + table(("attention", "keys read", "accuracy", "loss", "step"), rows)


def baselines() -> str:
    results = load("baselines")
    found = {
        name: {(row["attention"], row["runtime"]): row for row in results[name]} for name in ("sts_b", "reviews", "heads")
    }
    longest = max(row["n"] for row in results["runs"])
    rows = []
    for run in (row for row in results["runs"] if row["n"] == longest):
        key = run["attention"], run["runtime"]
        task, text, head = (found[name].get(key) for name in ("sts_b", "reviews", "heads"))
        rows.append(
            (
                f"{key[0]}, {key[1]}" if key[0] == "classical" else key[0],
                percent(head["mean"]) if head else "",
                f"{task['spearman_x100']:.2f}" + (f" ± {task['ci95']:.2f}" if task["ci95"] else ""),
                f"{text['cosine']:.4f}",
                f"{text['accuracy_percent']:.1f} %",
                f"{run['ms']:.0f} ms",
                times(run["x_classical"]),
                f"{run['memory_mb']:.0f} MB" if run["memory_mb"] is not None else "",
            )
        )
    header = ("attention", "head", "STS-B", "cosine", "accuracy", "time", "classical takes", "memory")
    parameters = results["parameters"]
    return paragraph(f"""
    ## Other approximations in the same model
    all-MiniLM-L6-v2 with one attention in the place of all six, nothing
    retrained: mean error of a head on reviews of {parameters["tokens"]} tokens; Spearman × 100 on STS-B (14 tokens: with 32
    keys and more all is exact; {parameters["seeds"]} seeds with the 95 % interval); on {parameters["reviews"]} reviews of
    {parameters["tokens"]} tokens the cosine with the classical embedding and the accuracy of a probe (a few points are
    noise); time of a run at batch
    1, {longest} tokens, how many times as long the classical model of the same runtime takes, and the memory that a run
    needs beside the model {source("baselines", results)}. Ours and the first row are bundles in onnxruntime, the others
    torch functions in the torch model. Performer and Linformer are meant for training with them; here their features and
    projections are random, and Linformer's shorter texts are filled with zeros.
    """) + table(header, rows)


def scaling() -> str:
    results = load("scaling")
    settings = results["settings"]
    rows = []
    for contender in results["contenders"]:
        if not contender["lengths"]:
            continue
        fit, last = contender["fit"], contender["lengths"][-1]
        half = f" ± {(fit['ci95'][1] - fit['ci95'][0]) / 2:.2f}" if fit and fit["ci95"] else ""
        rows.append(
            (
                contender["name"],
                f"{fit['exponent']:.2f}{half}" if fit else "",
                f"{fit['last_exponent']:.2f}" if fit else "",
                last["n"],
                f"{last['ms']:.3g} ms",
                f"{last['memory_bytes'] / 1e6:.3g} MB" if last["memory_bytes"] is not None else "",
                percent(last["error_mean"]),
                percent(last["bound"]) if last["bound"] else "",
            )
        )
    threads = f"{settings['threads']} thread" + "s" * (settings["threads"] > 1)
    where = f"{results['machine']['processor']}, {threads}, onnxruntime {results['versions']['onnxruntime']}"
    header = ("attention", "exponent", "last two", "longest", "time", "memory", "error", "bound")
    return paragraph(f"""
    ## Against the length
    The exponent a of time ~ n^a with its 95 % interval, and between the last two lengths alone:
    {settings["heads"]} heads of {settings["head_size"]}, {settings["lengths"][0]} to {settings["lengths"][-1]} tokens,
    Gaussian inputs; and at the longest length that was run the time, the memory beside inputs and output, and the error
    beside the least one of whoever reads as many values and nothing else ({where}, `qexport scaling`). What changes its way
    with the length has a wide interval: exact attention is linear work in good part on short inputs. Gaussian inputs are
    the hardest case for whoever leaves keys out; `--activations` takes others. The picture:
    [bench/results/scaling.png](../bench/results/scaling.png).
    """) + table(header, rows)


def noise() -> str:
    results = load("noise")
    by_package = {}
    for row in results["packages"]:
        by_package.setdefault(row["package"], {})[row["qubits"]] = row
    rows = []
    for package, found in by_package.items():
        cells = [package]
        for row in found.values():
            ours = row["x_closed_form"] == 1
            cells += [_time(row["p50_ms"]), "" if ours else f"{row['x_closed_form']:,.0f} ×", f"{row['error']:.0e}"]
        rows.append(tuple(cells))
    sizes = [f"{row['rows']} rows of {row['n']}" for row in next(iter(by_package.values())).values()]
    header = ("", *(title for size in sizes for title in (size, "longer", "error")))
    return paragraph(f"""
    ## The same noisy probabilities
    Rows of attention behind depolarizing noise of {results["parameters"]["level"]:g} on
    each of their qubits, measured in the Z basis: QuantumNoise by its closed form, the others from density matrices, each
    with all rows in one job or call where it can, in single precision where it has that, circuits made beforehand
    {source("noise", results)}. Median times of calls that take turns, how many times as long they are as QuantumNoise's, and
    the largest error of a probability. This says nothing about circuits that have no closed form.
    """) + table(header, rows)


def compression() -> str:
    results = load("compress")
    losses = {
        "minilm": (
            "all-MiniLM-L6-v2",
            lambda row: f"cosine {row['cosine']:.4f}, STS-B {row['spearman_loss_percent']:.2f} %",
        ),
        "char_gpt": ("character-level GPT, 3.2 M", lambda row: f"{row['loss']:.4f} ± {row['ci95']:.4f} nats"),
        "vit": ("ViT-S/14", lambda row: f"cosine {row['cosine']:.4f}"),
    }
    speed = {(row["model"], row["contender"]): row for row in results["latency"] if row["batch"] == 1}  # the longest
    rows = []
    for model, (title, loss) in losses.items():
        for row in results[model][1:]:
            size = f"{row['bytes'] / 1e6:.2f} MB", f"{row['ratio']:.2f} ×"
            rows.append((title, row["contender"], *size, loss(row), times(speed[model, row["contender"]]["x_classical"])))
    return paragraph(f"""
    ## Smaller weights
    `qexport compress`, with `--products int8` where it says so, beside onnxruntime's dynamic int8:
    bytes of the file, how many times smaller than the float32 file, what is lost on data that nothing was fitted to (cosine
    with the embeddings of the original and loss of the correlation on the STS-B test split; nats per character of
    WikiText-2; cosine of the output map on other photos), and how many times as long the float32 model takes at batch 1, the
    longest inputs {source("compress", results)}. All run in a stock onnxruntime. The picture:
    [bench/results/compress.png](../bench/results/compress.png).
    """) + table(("model", "stored by", "file", "smaller", "lost", "float32 takes"), rows)


def _time(ms: float) -> str:
    return f"{1e3 * ms:.3g} µs" if ms < 0.1 else f"{ms:,.3g} ms" if ms < 1000 else f"{ms / 1e3:.2g} s"
