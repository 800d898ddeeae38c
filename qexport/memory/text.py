"""A memory report in lines of text."""

LEFT = 28


def size_text(count: float | None) -> str:
    """Bytes with three digits and their unit, decimal as in KB = 1000 B; "" for None."""
    if count is None:
        return ""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000


def report_text(report: dict) -> str:
    """A report, as `MemoryReport.to_dict()` gives it: its blocks, what measuring took, trends, and what was not there."""
    lines = []
    for block in report["blocks"]:
        lines += [*_block_lines(block), ""]
    overhead = report["overhead"]
    lines.append(f"{report['seconds']:.3g} s, of which measuring took {overhead['seconds']:.2g} s ({overhead['share']:.1%})")
    for name, trend in report["trends"].items():
        if trend["bytes_per_second"] is not None:
            lines.append(f"{name:{LEFT}}{_rate(trend['bytes_per_second'], trend['ci95'], 's')}")
    lines += [f"absent {name}: {reason}" for name, reason in report["absent"].items()]
    return "\n".join(lines)


def _block_lines(block: dict) -> list[str]:
    calls = f"{block['calls']} call" + "s" * (block["calls"] != 1)
    shared = f", {block['overlapped_calls']} of them beside blocks of other threads" if block["overlapped_calls"] else ""
    lines = [f"{'/'.join(block['path'])}: {calls}, {block['seconds']:.3g} s{shared}"]
    for name, found in block["counters"].items():
        rise, peak = (size_text(found[key]) for key in ("rise_bytes", "peak_bytes"))
        left = f"left {size_text(found['left_bytes'])}"
        lines.append(f"  {name:{LEFT - 2}}peak {peak:>8} ({found['peak_is']}), rise {rise:>8}, {left}")
    lines.append(f"  {'leak':{LEFT - 2}}{leak_text(block['leak'])}")
    for name, ratio in block["efficiency"].items():
        if ratio:
            lines.append(f"  {name.replace('_', ' '):{LEFT - 2}}{ratio_text(ratio)}")
    return lines


def leak_text(leak: dict) -> str:
    """The verdict in words, with its p-value and the counter that it is from."""
    if leak["p_value"] is None:
        return leak["verdict"]
    if leak["verdict"] == "no leak" and leak["p_value"] < leak["level"]:
        return "no leak: what grew is too little to count"
    rate = "" if leak["verdict"] == "no leak" else f", {size_text(leak['bytes_per_call'])} a call by {leak['counter']}"
    return f"{leak['verdict']}{rate} (p = {leak['p_value']:.2g})"


def ratio_text(ratio: dict) -> str:
    """A ratio with what is divided by what."""
    parts = [
        f"{part['what']} {size_text(part['value']) if part['what'] != 'tokens' else part['value']}"
        for part in (ratio["numerator"], ratio["denominator"])
    ]
    value = size_text(ratio["value"]) if parts[1].startswith("tokens") else f"{ratio['value']:.3g} x"
    return f"{value} ({parts[0]} / {parts[1]})"


def _rate(slope: float, interval, unit: str) -> str:
    bounds = "" if interval is None else f" [{size_text(interval[0])}, {size_text(interval[1])}]"
    return f"{size_text(slope)}/{unit}{bounds}"
