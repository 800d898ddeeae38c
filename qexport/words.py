"""Names and numbers as the reports write them."""


def samples_text(numbers: list[int]) -> str:
    """32, or "8 to 64" where the heads differ."""
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


def site_label(site: dict) -> str:
    """How a site is called: its torch module where there is one, else its node."""
    return site.get("module") or site["name"]


def plural(count: int, word: str) -> str:
    """ "1 attention", "2 attentions"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def recipe_text(
    strategy: str = "",
    num_samples=(),
    precision: str = "fp32",
    error_tolerance: float = 0.0,
    noise: str | None = None,
    shots=None,
    **_,
) -> str:
    """How a site is computed: "stratified, 32 samples", "tree, error up to 1 %, auto precision", "exact, bf16",
    "depolarizing:0.01, 1024 shots", or blank for attention that is not ours."""
    if noise:
        return f"{noise}, {shots} shots"
    parts = [strategy]
    if error_tolerance:
        parts.append(f"error up to {percent(error_tolerance)}")
    elif strategy not in ("", "exact"):
        counted = "key" if strategy == "tree" else "sample"
        parts.append(f"{samples_text(num_samples)} {counted if set(num_samples) == {1} else counted + 's'}")
    if precision not in ("", "fp32"):
        parts.append("auto precision" if precision == "auto" else precision)
    return ", ".join(parts)


def percent(value: float | None) -> str:
    """A relative error or a loss with two digits that count: 190 %, 4.1 %, 0.012 %, -0.14 %, 3.2e-07."""
    if value is None:
        return "not finite"
    if value == 0:
        return "0"
    if value < 0:
        return f"-{percent(-value)}"
    if value >= 0.995:  # two digits of it are 100 %
        return f"{100 * value:.0f} %"
    return f"{value:.1e}" if value < 1e-5 else f"{100 * value:.2g} %"


def megabytes(count: int | None) -> str:
    """Bytes as 1.5 MB, 91 MB; "" where they are not known."""
    return "" if count is None else f"{count / 1e6:.{0 if count >= 1e7 else 2}f} MB"


def error_text(metrics: dict | None) -> str:
    """An error of validate: the mean over the seeds with the half width of its 95 % confidence interval."""
    if metrics is None:
        return ""
    error, interval = metrics["relative_error"], metrics["relative_error_ci95"]
    text = percent(error)
    # an interval that would not change a printed digit is rounding, not sampling
    if error is None or interval is None or interval[1] - interval[0] < 1e-3 * error or error < 1e-5:
        return text
    return f"{text} ± {percent((interval[1] - interval[0]) / 2)}"
