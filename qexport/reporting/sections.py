"""The sections of a report that hold measurements: each turns a part of it into HTML."""

from qexport.profiling import CONVERTED
from qexport.providers import CUDA
from qexport.reporting import charts
from qexport.reporting.judgement import speed
from qexport.reporting.markup import chart, facts, folded, items, paragraph, table
from qexport.words import error_text, megabytes, percent, plural, recipe_text, site_label


def accuracy(checked: dict) -> str:
    """Outputs end to end, and every attention."""
    data = checked["data"]
    seeds = f", {plural(len(checked['seeds']), 'seed')}" if checked["seeds"] else ""
    about = f"On {data['source']}: {plural(data['samples'], 'item')}{seeds}. Errors are relative Frobenius errors."
    rows = []
    for name, fallback in checked["outputs"]["fallback"].items():
        sampled = checked["outputs"].get("library", {}).get(name)
        shown = sampled or fallback
        cosine = "" if shown["cosine"] is None else f"{shown['cosine']:.5f}"
        rows.append((name, error_text(sampled), percent(fallback["relative_error"]), cosine))
    outputs = table(("output", "error", "without the library", "cosine"), rows, caption="End to end, mean over the seeds")
    if not checked["sites"]:
        return paragraph(about) + outputs + paragraph("No attention was converted, so there is none to compare.")
    rows = [
        (
            site_label(site),
            recipe_text(**site),
            site["local"]["bias"]["verdict"] if site["local"] else "",
            error_text(site["local"]),
            error_text(site["propagated"] or site["fallback"]),
        )
        for site in checked["sites"]
    ]
    header = ("attention", "recipe", "deviation", "own error", "error in the model")
    caption = (
        "By itself: the attention is fed with the classical model's values. As it runs through the model: what earlier "
        "attentions did to its inputs is part of it. Whiskers are 95 % intervals over the seeds."
    )
    drawn = chart(charts.accuracy(checked), caption, table(header, rows, text_columns=3))
    return paragraph(about) + items(data["notes"], "notes") + outputs + drawn


def samples(measured: dict) -> str:
    """Error against the number of samples."""
    sites = measured["sites"]
    found = charts.by_samples(sites)
    keys = sorted({site["keys"] for site in sites})
    if not found:
        return paragraph(
            f"With {keys[-1] if keys else 0} keys there is nothing to sample; longer inputs show it: --data FILE."
        )
    budgets = sorted({n for errors in found.values() for n in errors})
    rows = [
        (name, *(percent(sum(errors[n]) / len(errors[n])) if n in errors else "" for n in budgets))
        for name, errors in found.items()
    ]
    spread = f"{keys[0]} keys" if len(keys) == 1 else f"{keys[0]} to {keys[-1]} keys"
    about = (
        f"{plural(len(sites), 'attention')} of this model, each by itself, on {measured['data']['source']}: {spread}. "
        "What the budget of a recipe (num_samples) buys, whatever this bundle's recipe is."
    )
    caption = "Lines are means over the attentions, shades reach from the best attention to the worst."
    exact = [name for name, errors in found.items() if all(e <= charts.ROUNDING for many in errors.values() for e in many)]
    if exact:
        caption += f" {' and '.join(exact)}: no more than rounding, as every key is read at this length."
    drawn = chart(charts.samples(sites), caption, table(("strategy", *map(str, budgets)), rows))
    return paragraph(about) + drawn


def latency(timed: dict) -> str:
    """Percentiles against the length."""
    rows = []
    for size in timed["sizes"]:
        interval = size["ratio"]["median_ci95"]
        ratio = f"{size['ratio']['of_rounds']['p50']:.2f}"
        ratio += f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
        for which, model in size["models"].items():
            times = (f"{model['latency_ms'][p]:.3g}" for p in ("p50", "p90", "p99"))
            where = (which, size["batch"], size["sequence"] or "fixed")
            rows.append((*where, *times, f"{model['samples_per_second']:.3g}", ratio if which == CONVERTED else ""))
    settings = timed["settings"]
    about = (
        f"{plural(settings['runs'], 'run')} of each model, in turn, after {settings['warmup']} to warm up; "
        f"{', '.join(settings['providers'])}, threads: {settings['threads'] or 'all'}. "
    )
    header = ("model", "batch", "length", "p50 ms", "p90 ms", "p99 ms", "items/s", "time ratio (95 %)")
    caption = "The ratio is the converted model's time over the classical one's, below 1 is faster."
    return paragraph(f"{about}{speed(timed)}.") + chart(charts.latency(timed), caption, table(header, rows))


def ops(timed: dict) -> str:
    """Where the time goes, by op."""
    size = timed["sizes"][-1]
    spent = {which: charts.op_times(model) for which, model in size["models"].items()}
    counts = {which: {op["op"]: op["nodes"] for op in model["ops"]} for which, model in size["models"].items()}
    rows = [
        (
            op,
            *(f"{times[op] / 1e3:.3g}" if op in times else "" for times in spent.values()),
            *(nodes.get(op, "") for nodes in counts.values()),
        )
        for op in dict.fromkeys(op for times in spent.values() for op in sorted(times, key=times.get, reverse=True))
    ]
    header = ("op", *(f"{which} ms" for which in spent), *(f"{which} nodes" for which in spent))
    caption = "From onnxruntime's trace, which slows runs down: read shares here, and times above."
    if timed["settings"]["providers"][0] == CUDA:
        caption = "On a GPU: time to queue the kernels, not to run them."
    return chart(charts.ops(timed), caption, table(header, rows))


def memory(timed: dict) -> str:
    """Memory over time, and its chief figures."""
    size = timed["sizes"][-1]
    rows = []
    for which, model in size["models"].items():
        found = model["memory"] or {}
        figures = [found.get(f"{key}_bytes") for key in ("before", "loaded", "peak")]
        load = found.get("load_seconds")
        rows.append(
            (which, *map(megabytes, [*figures, model["arena_peak_bytes"]]), f"{load:.2f} s" if load is not None else "")
        )
    figures = table(("model", "before", "loaded", "peak", "peak of the arena", "load time"), rows)
    length = f", length {size['sequence']}" if size["sequence"] else ""
    about = paragraph(
        f"A process of its own for each model, batch {size['batch']}{length}: the runtime is imported, the session opened, "
        "and three runs follow. Resident memory includes what the runtime itself needs."
        + (" The memory of the GPU is not in it." if timed["settings"]["providers"][0] == CUDA else "")
    )
    spec = charts.memory(timed)
    if spec is None:
        return (
            about
            + figures
            + paragraph("Memory over time is not in this profile; 'qexport profile' of this version adds it.")
        )
    return about + chart(spec, "Watched from outside every 5 ms.", figures)


def scaling(swept: dict) -> str:
    """The attention alone beside others."""
    settings = swept["settings"]
    inputs = "Gaussian inputs" if settings["inputs"] == "gaussian" else settings["inputs"]
    heads = f"{plural(settings['heads'], 'head')} of {settings['head_size']}"
    order = ", causal" if settings["causal"] else ""
    about = f"One attention outside the model: {heads}{order}, {inputs}, {plural(settings['threads'], 'thread')}."
    shown = [contender for contender in swept["contenders"] if contender["lengths"]]
    lengths = sorted({row["n"] for contender in shown for row in contender["lengths"]})

    def rows(key, write):
        for contender in shown:
            found = {row["n"]: row[key] for row in contender["lengths"]}
            yield contender["name"], *(write(found[n]) if found.get(n) is not None else "" for n in lengths)

    header = ("attention", *(str(n) for n in lengths))
    notes = [f"{c['name']} stopped at {c['stopped']['n']}: {c['stopped']['reason']}" for c in shown if c["stopped"]]
    notes += [f"{one['name']} took no part: {one['reason']}" for one in swept["left_out"]]
    times = chart(
        charts.scaling(swept, "ms"),
        "Medians, shades from the first to the third quartile.",
        table(header, list(rows("ms", lambda ms: f"{ms:.3g} ms"))),
    )
    errors = chart(
        charts.scaling(swept, "error_mean"),
        "Against softmax attention in float64, mean of the heads.",
        table(header, list(rows("error_mean", percent))),
    )
    return paragraph(about) + times + errors + items(notes, "notes")


def size(found: dict, manifest: dict) -> str:
    """Files, parameters, and what compression did."""
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    kept = dict(sorted(files.items(), key=lambda item: item[1], reverse=True)[:6])
    rows = [(name, f"{count:,}") for name, count in files.items()]
    about = facts(
        {
            "converted model": megabytes(found["file_bytes"])
            # of weights that are packed, the numbers that are stored are bytes
            + ("" if found["compression"] else f", {found['parameters'] / 1e6:.3g} million parameters"),
            "weights": megabytes(found["parameter_bytes"]),
            "whole bundle": megabytes(sum(files.values())),
        }
    )
    drawn = chart(charts.sizes(kept), "", table(("file", "bytes"), rows)) if files else ""
    return about + drawn + (_compression(found["compression"]) if found["compression"] else "")


def _compression(compression: dict) -> str:
    size, metric = compression["size"], compression["metric"]
    about = (
        f"Its weights are compressed: {megabytes(size['before'])} became {megabytes(size['after'])}, {size['ratio']:.2f} "
        f"times smaller, at a loss of {percent(metric['loss'])} of {metric['name']}."
    )
    rows = [
        (weight["module"] or weight["name"], weight["method"], "int8" if weight.get("int8_products") else "")
        for weight in compression["layers"]
    ]
    columns = ("weight", "stored as", "products")
    return paragraph(about) + folded("How each weight is stored", table(columns, rows, text_columns=3))
