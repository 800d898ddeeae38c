"""The figures of a GPU, where there are any: nothing without a run."""

from bench.attention.goals import judged
from bench.markdown import RESULTS, load, paragraph, table, times

OURS = "exact, onnxruntime"


def gpu() -> str:
    """Markdown from the committed results; "" where there are none."""
    if not (RESULTS / "cuda.json").is_file():
        return ""
    results = load("cuda")
    parts = (_exact(results), _tree(results), _decode(results), _others(results), _goals(results))
    return "\n".join(part for part in parts if part)


def _us(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g} µs" if value < 1000 else f"{value / 1000:.3g} ms"


def _filled(header: tuple, rows: list[tuple]) -> str:
    """The table without columns that results of an earlier release do not have."""
    there = [i for i, name in enumerate(header) if not name or any(row[i] for row in rows)]
    return table(tuple(header[i] for i in there), [tuple(row[i] for i in there) for row in rows])


def _share(value: float | None) -> str:
    return f"{value:.0f} %" if value is not None else ""


def _error(value: float | None) -> str:
    return f"{100 * value:.2g} %" if value is not None else ""


def _exact(results: dict) -> str:
    card = results["parameters"]
    found = {}
    for row in results.get("exact", []):
        found.setdefault((row["n"], row["head_size"], row["causal"], row["dtype"]), {})[row["contender"]] = row
    rows = [
        (
            n,
            size,
            "causal" if causal else "",
            dtype,
            _us(rows[OURS]["us"]),
            _us(rows[OURS]["call_us"]),
            times(rows[OURS]["x_flash"]),
            times(rows[OURS]["x_flash_call"]),
            times(rows[OURS].get("x_own_flash")),
            times(rows["exact, torch"]["x_torch_flash"]),
            _share(rows[OURS]["percent_of_matmul"]),
        )
        for (n, size, causal, dtype), rows in found.items()
        if rows.get(OURS, {}).get("us") is not None
    ]
    if not rows:
        return ""
    rivals = ("MultiHeadAttention", "its call", "own flash", "torch flash")
    header = ("n", "d", "", "type", "device", "call", *rivals, "of a product")
    return paragraph(f"""
    ## On a GPU
    {card["card"]}, driver {card["driver"]}, CUDA {card["cuda"]}, onnxruntime {card["onnxruntime"]}, torch
    {card["torch"]} (`python -m bench.cuda`), which in the same run copies {card["copy_gb_per_s"]:.0f} GB/s (read and
    written) and multiplies large matrices at {card["float16_tflops"]:.0f} TFLOP/s in float16. Strategy `exact`, 8 heads,
    through onnxruntime: time on the device, until a caller has the result, how many times as long onnxruntime's
    MultiHeadAttention takes for either, which is cuDNN's kernels on such a card; how many times as long the flash kernel of
    onnxruntime's own takes on the device, and torch's flash attention as ours through torch; and what the operations at the
    speed of the large product would be of the time. A ratio is left out where one of both has no time of the device, as the
    host queued calls later than the device waited.
    """) + _filled(header, rows)


def _tree(results: dict) -> str:
    rows = [
        (
            f"{row['data']}, {row['layers']} layers, {row['heads']} heads of {row['head_size']}"
            + (", causal" if row["causal"] else "")
            + (f", {row['dtype']}" if row["dtype"] != "float16" else ""),
            row["n"],
            row["contender"],
            _error(row["error_mean"]),
            _error(row["error_worst"]),
            _us(row["us"]),
            times(row["x_flash"]),
            times(row.get("x_own_flash")),
        )
        for row in results.get("tree", [])
        if row["us"] is not None and row["contender"].startswith(("tree", OURS))
    ]
    if not rows:
        return ""
    return paragraph("""
    ## On a GPU: long inputs of trained models
    On the card above, in float16; weights rounded to 8 bits; positions stretched, so optimistic (bench/README.md): error of
    a head, mean and worst, and how many times as long onnxruntime's MultiHeadAttention takes, and its own flash kernel.
    """) + _filled(("activations", "n", "attention", "mean", "worst head", "time", "MultiHeadAttention", "own flash"), rows)


def _decode(results: dict) -> str:
    rows = [
        (
            f"{row['past'] // 1024}k",
            row["kv_heads"],
            row["contender"],
            _us(row["us"]),
            times(row["x_gqa"]),
            _share(row["percent_of_copy"]),
        )
        for row in results.get("decode", [])
        if row["us"] is not None
    ]
    if not rows:
        return ""
    return paragraph("""
    ## On a GPU: decoding
    On the card above: one new token over a past, 8 heads of 64 in float16, how many times as long onnxruntime's
    GroupQueryAttention with a shared buffer takes, and what reading the cache once at the speed of the copy would be of the
    time.
    """) + table(("past", "kv heads", "attention", "time", "GroupQueryAttention", "of the copy"), rows)


def _others(results: dict) -> str:
    ours = "onnxruntime"
    rows = [
        (row["op"], f"{row['rows']} rows of {row['n']}, {row['what']}", _us(row["us"]), _share(row["percent_of_copy"]), "")
        for row in results.get("rows", [])
        if row["contender"] == ours and row["us"] is not None
    ]
    rows += [
        (
            row["op"],
            f"{row['n']} x {row['n']}, bond dimension {row['bond_dim']}"
            + (f", {row['tokens']} rows" if row["tokens"] else ""),
            _us(row["us"]),
            "",
            f"{times(row['x_other'])} ({row['other']})" if row["x_other"] is not None else "",
        )
        for row in results.get("trains", [])
        if row["contender"] == ours and row["us"] is not None
    ]
    if not rows:
        return ""
    return paragraph("""
    ## On a GPU: the other ops
    On the card above, in float32: time on the device, what copying the rows would be of it, and how many times as long torch
    takes with the matrix at hand, or core by core where that has a time of the device.
    """) + table(("op", "", "time", "of the copy", "torch"), rows)


def _goals(results: dict) -> str:
    rows = [
        (row["goal"], row["limit"], f"{row['measured']:.3g}" if row["measured"] is not None else "", row["verdict"])
        for row in judged(results, "", file="cuda")
    ]
    head = paragraph("""
    ## On a GPU: goals
    On the card above.
    """)
    return head + table(("goal", "limit", "measured", ""), rows) if rows else ""
