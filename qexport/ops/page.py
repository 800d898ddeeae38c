"""The op table as text: docs/ops.md, and what `qexport ops` prints."""

from qexport.ops import DOMAIN, OPS, VERSION, Attr, OpSpec

NO_FALLBACK = "none: standard ONNX cannot do this"


def _limits(attr: Attr) -> str:
    if attr.choices:
        return ", ".join(map(str, attr.choices))
    return "" if attr.minimum is None else f">= {attr.minimum:g}"


def _default(attr: Attr) -> str:
    if attr.default is None:
        return "absent"
    return ", ".join(map(str, attr.default)) if isinstance(attr.default, tuple) else str(attr.default)


def _rows(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *cells)]


def _op(spec: OpSpec) -> list[str]:
    def params(title, items):
        rows = [(f"`{p.name}`", p.type_var, p.shape, "optional" if p.optional else "", p.doc) for p in items]
        return ["", f"### {title}", "", *_rows((title[:-1].lower(), "type", "shape", "", "meaning"), rows)]

    attributes = [(f"`{a.name}`", a.kind, _default(a), _limits(a), a.doc) for a in spec.attributes]
    types = [f"{var}: {', '.join(names)}" for var, names in spec.type_vars.items()]
    return [
        "",
        f"## {spec.name}",
        "",
        spec.summary,
        *params("Inputs", spec.inputs),
        *params("Outputs", spec.outputs),
        "",
        "### Attributes",
        "",
        *_rows(("attribute", "kind", "default", "values", "meaning"), attributes),
        "",
        f"Types. {'; '.join(types)}.",
        "",
        f"Fallback without the library: {spec.fallback or NO_FALLBACK}.",
    ]


def markdown_page() -> str:
    """docs/ops.md."""
    lines = [f"# Ops of the domain `{DOMAIN}`, version {VERSION}", "", "Made by `qexport ops --markdown` from the op table."]
    for spec in OPS:
        lines += _op(spec)
    return "\n".join(lines) + "\n"


def readme_table() -> str:
    """The op table of README.md."""
    rows = [
        (
            f"`{DOMAIN}::{spec.name}`",
            spec.summary,
            ", ".join(t.split("(")[1][:-1] for t in spec.type_vars["T"]),
            spec.fallback or NO_FALLBACK,
        )
        for spec in OPS
    ]
    return "\n".join(_rows(("op", "what it computes", "types", "without the library"), rows)) + "\n"


def summary_lines() -> list[str]:
    """A few lines per op for the terminal."""
    lines = [f"{DOMAIN} version {VERSION}"]
    for spec in OPS:
        mark = {True: "?", False: ""}
        lines += [
            "",
            spec.name,
            f"  {spec.summary}",
            f"  inputs      {', '.join(p.name + mark[p.optional] for p in spec.inputs)}",
            f"  outputs     {', '.join(p.name + mark[p.optional] for p in spec.outputs)}",
            f"  types       {', '.join(spec.type_vars['T'])}",
            f"  fallback    {spec.fallback or NO_FALLBACK}",
            "  attributes",
        ]
        for attr in spec.attributes:
            limits = _limits(attr)
            lines.append(f"    {attr.name:22}{_default(attr):>11}  {attr.doc}{f' [{limits}]' if limits else ''}")
    return [*lines, "", "? = optional. docs/ops.md is the whole page; docs/math.md has the formulas."]
