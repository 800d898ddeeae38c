"""Reports as text for people."""

from shlex import quote

import click

from qexport.cli.render_memory import show_memory
from qexport.cli.text import ran_on, table
from qexport.providers import CUDA
from qexport.words import error_text, megabytes, percent, plural, recipe_text, site_label


def _show_kinds(sites: list[dict]) -> None:
    """A line for each group of like sites."""
    kinds: dict[tuple, list[dict]] = {}
    for site in sites:
        kinds.setdefault((recipe_text(**site), site["q_heads"], site["kv_heads"], site["head_size"]), []).append(site)
    for (recipe, q_heads, kv_heads, size), group in kinds.items():
        heads = f"{q_heads} heads" if q_heads == kv_heads else f"{q_heads} heads on {kv_heads}"
        names = site_label(group[0]) + (f" ... {site_label(group[-1])}" if len(group) > 1 else "")
        click.echo(f"  {len(group)} x {recipe}, {heads} of {size}: {names}")


def show_conversion(report, verbose: bool) -> None:
    """What `convert` did."""
    found = len(report.sites) + len(report.left_alone)
    verb = "converted" if report.path else "would be converted"
    click.echo(f"{len(report.sites)} of {plural(found, 'attention')} {verb}")
    if verbose:
        rows = [(site_label(s), recipe_text(**s), s["q_heads"], s["head_size"]) for s in report.sites]
        table("", ("site", "recipe", "heads", "head size"), rows, text_columns=2)
    else:
        _show_kinds(report.sites)
    for site in report.left_alone:
        click.echo(f"  left alone {site_label(site)}: {site['reason']}")
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.path:
        manifest = report.manifest
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        click.echo(
            f"{report.path}: {size / 1e6:.1f} MB, opset {manifest['opset']}, "
            f"for onnxruntime {manifest['min_onnxruntime']} and newer"
        )
        click.echo(f"next: qexport validate {quote(str(report.path))}")


def _measured(found: dict) -> str:
    """The bundle, and the machine where that is another one."""
    return f"{found['bundle']} at {found['target']}" if found["target"] else found["bundle"]


def show_validation(report, verbose: bool) -> None:
    """What `validate` found: outputs, sites, verdict."""
    data, found = report.to_dict()["data"], report.to_dict()
    click.echo(
        f"{_measured(found)} on {data['source']}: {plural(data['samples'], 'item')}, {plural(len(found['seeds']), 'seed')}"
        f"{ran_on(found['settings'])}"
    )
    for note in data["notes"]:
        click.echo(f"note: {note}")
    rows = []
    for name, fallback in found["outputs"]["fallback"].items():
        sampled = found["outputs"].get("library", {}).get(name)
        shown = sampled or fallback
        rows.append(
            (
                name,
                percent(fallback["relative_error"]),
                error_text(sampled),
                _fixed(shown["cosine"]),
                _digits(shown["max_abs_error"]),
            )
        )
    header = ("output", "error without library", "error with library", "cosine", "max abs")
    table("Against the classical model, end to end (relative Frobenius error)", header, rows)
    show_sites(found["sites"], verbose)
    for note in found["notes"]:
        click.echo(f"note: {note}")
    _show_verdict(found)


def _digits(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def show_sites(sites: list[dict], verbose: bool) -> None:
    """The attentions one by one; with many of them the five with the largest own error, unless `verbose`."""

    def own(site):
        return (site["local"] or site["propagated"] or site["fallback"])["relative_error"] or float("inf")

    shown = sites if verbose or len(sites) <= 12 else sorted(sites, key=own, reverse=True)[:5]
    columns = {
        "site": site_label,
        "recipe": lambda s: recipe_text(**s),
        "deviation": lambda s: s["local"]["bias"]["verdict"] if s["local"] else "",
        "own error": lambda s: error_text(s["local"]),
        "worst head": lambda s: _head_text((s["local"] or {}).get("worst_head")),
        "estimated (worst head)": _estimate_text,
        "error in the model": lambda s: error_text(s["propagated"]),
    }
    title = (
        "Attention by attention"
        if len(shown) == len(sites)
        else f"The {len(shown)} of {len(sites)} attentions that err most"
    )
    text = {name: [cell(site) for site in shown] for name, cell in columns.items()}
    if not any(site["certificate"] and site["certificate"]["relative_error"] for site in sites):
        del text["estimated (worst head)"]
    numbers = len(text) - 3
    for name in ("deviation", "recipe"):  # what all sites share goes into the title, so that the table stays narrow
        if len(set(text[name])) == 1:
            (common,) = set(text.pop(name))
            title += f"; {name} {common}" if common else ""
    table(title, tuple(text), list(zip(*text.values(), strict=True)), text_columns=len(text) - numbers)


def _estimate_text(site: dict) -> str:
    """The op's own estimate of the error, and the one of the head that errs most."""
    found = site["certificate"]
    if not found or not found["relative_error"]:
        return "all keys read" if found else ""
    return f"{percent(found['relative_error'])} ({percent(found['worst_head']['relative_error'])})"


def _head_text(worst: dict | None) -> str:
    return f"{percent(worst['relative_error'])} (head {worst['head']})" if worst else ""


def _show_verdict(found: dict) -> None:
    limit = found["max_error"]["library"] or found["max_error"]["fallback"]
    noisy = any(site["noise"] for site in found["sites"])
    if found["passed"] and noisy and found["max_error"]["library"] is None:
        click.echo(f"PASSED without the library, within {percent(limit)}; what the noise does is above")
    elif found["passed"] and found["sensitivity"]:
        click.echo("PASSED: no attention is wrong by itself, and the outputs move no more than rounding can explain")
    elif found["passed"]:
        click.echo(f"PASSED: every output is within {percent(limit)}")
    else:
        for key, words in (
            ("first_divergent", "first site that is wrong"),
            ("first_over_tolerance", "first site over the limit"),
        ):
            if found[key]:
                error = percent(found[key]["relative_error"])
                click.echo(f"{words}: {site_label(found[key])}, {error} ({found[key]['mode']})")
        click.echo("\n".join(f"FAILED: {reason}" for reason in found["reasons"]))


def show_profile(report, verbose: bool) -> None:
    """What `profile` measured: latency of both models per size, ratio, memory, ops."""
    found = report.to_dict()
    settings, machine = found["settings"], found["machine"]
    threads = settings["threads"] or "all"
    click.echo(
        f"{_measured(found)}: {machine['processor']}, {machine['cpu_count']} cores, "
        f"onnxruntime {found['versions']['onnxruntime']}, {', '.join(settings['providers'])}, threads: {threads}, "
        f"{plural(settings['runs'], 'run')}, interleaved"
    )
    rows = []
    for size in found["sizes"]:
        for which, model in size["models"].items():
            latency = model["latency_ms"]
            ratio = size["ratio"]["of_rounds"]["p50"] if which == "converted" else None
            rows.append(
                (
                    which,
                    size["batch"],
                    size["sequence"] or "fixed",
                    *(f"{latency[p]:.2f}" for p in ("p50", "p90", "p99")),
                    f"{ratio:.2f} x" if ratio else "",
                    f"{model['samples_per_second']:.1f}",
                    megabytes(model["memory"]["peak_bytes"]),
                    f"{model['memory']['load_seconds'] * 1e3:.0f}",
                )
            )
    on_gpu = settings["providers"][0] == CUDA
    peak = "peak host memory" if on_gpu else "peak memory"
    header = ("model", "batch", "seq", "p50 ms", "p90 ms", "p99 ms", "time ratio", "items/s", peak, "load ms")
    table("Latency", header, rows)
    last = found["sizes"][-1]
    for which, model in last["models"].items():
        rows = [(op["op"], op["nodes"], f"{op['time_us'] / 1e3:.2f}", f"{100 * op['share']:.0f} %") for op in model["ops"]]
        size = f"batch {last['batch']}, seq {last['sequence'] or 'fixed'}"
        # Kernels on a GPU run behind the back of the runtime's trace.
        what = "Time to queue kernels" if on_gpu else "Where the time goes"
        table(f"{what}, {which}, {size}", ("op", "nodes", "ms", "share"), rows if verbose else rows[:6])
        if verbose:
            _show_nodes(which, model["nodes"])
        if model["memory"]["profile"]:
            show_memory(which, size, model, found["versions"]["onnxruntime"], verbose)
        placement = model["placement"]
        if placement["not_on_first_provider"] or placement["memcpy_nodes"]:
            away = plural(len(placement["not_on_first_provider"]), "node")
            copies = placement["memcpy_nodes"]
            click.echo(f"{which}: {away} not on {placement['asked'][0]}, {copies} copies between devices")


def _show_nodes(which: str, nodes: list[dict]) -> None:
    """Every node with its provider, its time and the memory in use."""
    rows = [
        (
            n["name"],
            n["op"],
            n["provider"],
            f"{n['time_us'] / 1e3:.3f}",
            megabytes(n["memory_in_use_bytes"]),
            megabytes(n["output_bytes"]),
        )
        for n in nodes
    ]
    header = ("node", "op", "provider", "ms", "memory in use", "output")
    table(f"Node by node, {which}", header, rows, text_columns=3)


def show_demo(report, verbose: bool) -> None:
    """One table for the whole demo, and what to try next."""
    conversion, checked, timed = report.conversion, report.validation.to_dict(), report.profile.to_dict()
    size = timed["sizes"][0]
    classical, converted = (size["models"][which]["latency_ms"]["p50"] for which in ("classical", "converted"))
    sites = conversion.sites
    rows = [
        ("attentions converted", f"{len(sites)} of {len(sites) + len(conversion.left_alone)}"),
        ("recipe", recipe_text(**sites[0])),
        ("checked on", f"{plural(checked['data']['samples'], 'English text')}, {plural(len(checked['seeds']), 'seed')}"),
    ]
    for name, metrics in checked["outputs"]["library"].items():
        rows.append((f"error of {name}", f"{error_text(metrics)} (cosine {_fixed(metrics['cosine'])})"))
    without = max(metrics["relative_error"] for metrics in checked["outputs"]["fallback"].values())
    worst = checked["worst_site"]
    rows += [
        ("error without the library", percent(without)),
        ("worst attention", f"{site_label(worst)}, {percent(worst['relative_error'])} by itself"),
        (f"latency, batch 1, {size['sequence']} tokens", f"classical {classical:.2f} ms, converted {converted:.2f} ms"),
        ("time ratio", f"{size['ratio']['of_rounds']['p50']:.2f} x (below 1 is faster than classical)"),
    ]
    table(f"all-MiniLM-L6-v2 as {conversion.path}/model.onnx", ("", ""), rows, text_columns=2)
    if verbose:
        show_sites(checked["sites"], verbose)
    _show_verdict(checked)
    click.echo(
        f"next: qexport validate {quote(str(conversion.path))} --seq 256 --batch 4, or qexport convert YOUR_MODEL -o DIR"
    )
