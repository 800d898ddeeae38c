"""What the charts of a report show, as plain data that page.js draws.

A chart is `lines` or `bars`. Both have a `title`, axes (`label`; `unit`: %, ms, us, MB, s or ""; `scale`: linear, or log for
positive values) and `series` (`name`, and `tone`, a colour of the page).

lines   series have `points` [x, y] or [x, y, low, high], a `mark` and a `dash`; `moments` (`x`, `text`) are lines across.
bars    `rows` have a `label` and `values`, for each series [value, low, high], [value] or null; `limits` (`value`, `text`).
"""

import math

from qexport.profiling import CLASSICAL, CONVERTED
from qexport.reporting.judgement import limit
from qexport.words import percent, site_label

TONES = {CLASSICAL: 1, CONVERTED: 2}
MARKS = ("circle", "square", "diamond", "triangle", "cross", "circle")
MOST_ROWS = 24  # of a chart with bars; tables have them all
OPS = 10
ROUNDING = 1e-5  # relative errors up to here are no sampling errors, and would stretch a logarithmic axis by decades


def accuracy(checked: dict) -> dict:
    """Error of each attention, by itself and as it runs through the model."""
    sites = checked["sites"]
    if len(sites) > MOST_ROWS:
        sites = sorted(sites, key=lambda s: _most(s["propagated"] or s["fallback"]), reverse=True)[:MOST_ROWS]
    kinds = {"local": "by itself", "propagated": "as it runs through the model", "fallback": "without the library"}
    kinds = {kind: name for kind, name in kinds.items() if any(s[kind] for s in sites)}
    if checked["seeds"]:
        kinds.pop("fallback", None)
    most = limit(checked)
    which = "each attention" if len(sites) == len(checked["sites"]) else f"the {MOST_ROWS} attentions that err most"
    return {
        "kind": "bars",
        "title": f"Error of {which}",
        "x": {"label": "relative error", "unit": "%"},
        "series": [{"name": name, "tone": 2 if kind == "local" else 3} for kind, name in kinds.items()],
        "rows": [{"label": site_label(s), "values": [_interval(s[kind]) for kind in kinds]} for s in sites],
        "limits": [] if most is None else [{"value": 100 * most, "text": f"limit of the outputs, {percent(most)}"}],
    }


def _most(metrics: dict | None) -> float:
    return -1.0 if metrics is None else math.inf if metrics["relative_error"] is None else metrics["relative_error"]


def _interval(metrics: dict | None) -> list | None:
    if metrics is None or metrics["relative_error"] is None:
        return None
    interval = metrics["relative_error_ci95"] or []
    return [100 * value for value in (metrics["relative_error"], *interval)]


def by_samples(sites: list[dict]) -> dict[str, dict[int, list[float]]]:
    """Strategy, with its precision where it is not float32, to number of samples to the errors of the attentions that were
    measured so. Settings with a tolerance are no budget, and residuals that draw are another estimator."""
    found: dict[str, dict[int, list[float]]] = {}
    for site in sites:
        for entry in site["measured"]:
            setting, error = entry["setting"], entry["relative_error"]
            samples, precision = setting.get("num_samples"), setting.get("precision", "fp32")
            plain = not setting.get("error_tolerance") and setting.get("residual", "verify_only") == "verify_only"
            if error is not None and isinstance(samples, int) and plain:
                name = setting["strategy"] + (f", {precision}" if precision != "fp32" else "")
                found.setdefault(name, {}).setdefault(samples, []).append(error)
    return found


def samples(sites: list[dict]) -> dict:
    """Mean error of the attentions against the number of samples, from the least of them to the largest."""
    series = []
    for i, (strategy, budgets) in enumerate(by_samples(sites).items()):
        points = [
            [n, *(100 * x for x in (sum(errors) / len(errors), max(min(errors), ROUNDING), max(errors)))]
            for n, errors in sorted(budgets.items())
            if max(errors) > ROUNDING
        ]
        if points:
            series.append({"name": strategy, "tone": 2 + i % 5, "mark": MARKS[i % len(MARKS)], "points": points})
    return {
        "kind": "lines",
        "title": "Error of an attention against its samples",
        "x": {"label": "samples per query", "unit": "", "scale": "log"},
        "y": {"label": "relative error, mean of the attentions", "unit": "%", "scale": "log"},
        "series": series,
    }


def latency(timed: dict) -> dict:
    """Percentiles of a run's time against the length; bars where there is one size."""
    names = {"p50": "", "p90": "6 4", "p99": "2 3"}
    sizes = timed["sizes"]
    lengths = [size["sequence"] for size in sizes if size["batch"] == sizes[-1]["batch"]]
    title = f"Time of a run, batch {sizes[-1]['batch']}"
    if len(lengths) < 2 or None in lengths:
        models = sizes[-1]["models"]
        return {
            "kind": "bars",
            "title": title + (f", length {lengths[-1]}" if lengths[-1] else ""),
            "x": {"label": "time of a run", "unit": "ms"},
            "series": [{"name": which, "tone": TONES[which]} for which in models],
            "rows": [{"label": p, "values": [[m["latency_ms"][p]] for m in models.values()]} for p in names],
        }
    return {
        "kind": "lines",
        "title": title,
        "x": {"label": "sequence length", "unit": "", "scale": "log"},
        "y": {"label": "time of a run", "unit": "ms", "scale": "log"},
        "series": [
            {
                "name": f"{which}, {p}",
                "tone": tone,
                "dash": dash,
                "mark": MARKS[tone - 1],
                "points": [
                    [s["sequence"], s["models"][which]["latency_ms"][p]] for s in sizes if s["batch"] == sizes[-1]["batch"]
                ],
            }
            for which, tone in TONES.items()
            for p, dash in names.items()
        ],
    }


def ops(timed: dict) -> dict:
    """Time by op of both models at the largest size, those that take the most."""
    size = timed["sizes"][-1]
    spent = {which: op_times(model) for which, model in size["models"].items()}
    most = {op: max(times.get(op, 0.0) for times in spent.values()) for times in spent.values() for op in times}
    names = sorted(most, key=most.get, reverse=True)
    length = f", length {size['sequence']}" if size["sequence"] else ""
    return {
        "kind": "bars",
        "title": f"Time by op, batch {size['batch']}{length}",
        "x": {"label": "time in a run, traced", "unit": "us"},
        "series": [{"name": which, "tone": TONES[which]} for which in spent],
        "rows": [{"label": op, "values": [[t[op]] if op in t else None for t in spent.values()]} for op in names[:OPS]],
    }


def op_times(model: dict) -> dict[str, float]:
    """Microseconds of a run by op, all providers together."""
    times: dict[str, float] = {}
    for op in model["ops"]:
        times[op["op"]] = times.get(op["op"], 0.0) + op["time_us"]
    return times


def memory(timed: dict) -> dict | None:
    """Resident memory from opening a session to the last run, both models; None where it was not watched."""
    models = timed["sizes"][-1]["models"]
    lines = {which: (model["memory"] or {}).get("timeline") for which, model in models.items()}
    if not all(line and line["seconds"] for line in lines.values()):
        return None
    return {
        "kind": "lines",
        "title": "Resident memory of a process that loads the model and runs it",
        "x": {"label": "seconds since the session was opened", "unit": "s", "scale": "linear"},
        "y": {"label": "resident memory", "unit": "MB", "scale": "linear"},
        "series": [
            {
                "name": which,
                "tone": TONES[which],
                "dash": "" if which == CONVERTED else "6 4",
                "points": [[at, size / 1e6] for at, size in zip(line["seconds"], line["bytes"], strict=True)],
            }
            for which, line in lines.items()
        ],
        "moments": [{"x": line["loaded"], "text": f"{which} loaded", "tone": TONES[which]} for which, line in lines.items()],
    }


def sizes(entries: dict[str, int]) -> dict:
    """Files of a bundle by their bytes."""
    return {
        "kind": "bars",
        "title": "Files",
        "x": {"label": "size on disk", "unit": "MB"},
        "series": [{"name": "size on disk", "tone": 2}],
        "rows": [{"label": name, "values": [[size / 1e6]]} for name, size in entries.items()],
    }


def scaling(swept: dict, key: str) -> dict:
    """Time ("ms") or error ("error_mean") of the contenders of a sweep against the length."""
    times = key == "ms"
    series = []
    for i, contender in enumerate(c for c in swept["contenders"] if c["lengths"]):
        points = [[row["n"], row[key] * (1 if times else 100)] for row in contender["lengths"] if row[key]]
        if times:
            points = [[row["n"], row["ms"], row["ms_p25"], row["ms_p75"]] for row in contender["lengths"]]
        ours = contender["provider"] == "qexport"
        style = {"tone": 1 + i % 6, "mark": MARKS[i % len(MARKS)], "dash": "" if ours else "6 4"}
        if points:
            series.append({"name": contender["name"], **style, "points": points})
    return {
        "kind": "lines",
        "title": "Time of one attention" if times else "Error of one attention",
        "x": {"label": "queries and keys", "unit": "", "scale": "log"},
        "y": {"label": "time of a call" if times else "relative error", "unit": "ms" if times else "%", "scale": "log"},
        "series": series,
    }
