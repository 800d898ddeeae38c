"""What the figures of a report come to, in a sentence, and why not where they do not hold."""

from qexport.words import percent, plural


def verdict(parts: dict) -> tuple[bool | None, str, list[str]]:
    """(passed, the verdict in a sentence, why it failed): `passed` is None where nothing was validated."""
    checked = parts.get("validate")
    reasons = list(checked["reasons"]) if checked else []
    changed = parts["inspect"]["changed_files"]
    if changed:
        reasons.append(f"{plural(len(changed), 'file')} changed since the bundle was written: {', '.join(changed)}")
    passed = not reasons if checked or reasons else None
    sentences = [_accuracy(checked) if checked else "The outputs were not compared with the classical model's"]
    if "profile" in parts:
        sentences.append(speed(parts["profile"]))
    return passed, " ".join(f"{sentence}." for sentence in sentences), reasons


def worst_output(checked: dict) -> tuple[str, dict]:
    """Name and metrics of the output with the largest error, with the library where it ran."""
    outputs = checked["outputs"].get("library") or checked["outputs"]["fallback"]
    return max(outputs.items(), key=lambda item: _or_infinite(item[1]["relative_error"]))


def limit(checked: dict) -> float | None:
    """What the outputs may differ by; None where the noise of a recipe has no limit."""
    return checked["max_error"]["library" if checked["seeds"] else "fallback"]


def _or_infinite(value: float | None) -> float:
    return float("inf") if value is None else value


def _accuracy(checked: dict) -> str:
    name, metrics = worst_output(checked)
    found = f"{percent(metrics['relative_error'])} at {name}"
    most = limit(checked)
    if most is None:
        return f"The outputs differ from the classical model's by {found}; noise has no limit of its own"
    if metrics["relative_error"] is None or metrics["relative_error"] > most:
        return f"The outputs differ from the classical model's by {found}, more than the {percent(most)} allowed"
    return f"The outputs stay within {percent(most)} of the classical model's: {found}"


def speed(timed: dict) -> str:
    """How the times of the two models compare at the largest size, with the confidence interval of the ratio."""
    size = timed["sizes"][-1]
    ratio, interval = size["ratio"]["of_rounds"]["p50"], size["ratio"]["median_ci95"]
    where = f"At batch {size['batch']}" + (f" and length {size['sequence']}" if size["sequence"] else "")
    if interval and interval[0] <= 1 <= interval[1]:
        return f"{where} it is as fast as the classical model, as far as {timed['settings']['runs']} runs can tell"
    spread = f" (95 % interval {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    return f"{where} it takes {ratio:.2f} times as long as the classical model{spread}"
