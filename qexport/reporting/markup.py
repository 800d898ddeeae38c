"""HTML from plain data. Everything that comes from outside goes through `text`."""

import html
import json


def text(value) -> str:
    """A value as text of a page."""
    return html.escape(str(value))


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is its class."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def items(lines: list[str], kind: str = "") -> str:
    """A list; nothing where it is empty."""
    return f'<ul class="{kind}">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>' if lines else ""


def facts(pairs: dict) -> str:
    """Names and what they are, those left out that have nothing to say."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs.items() if value)
    return f"<dl>{rows}</dl>"


def code(lines: str) -> str:
    """Text that is copied into a terminal or a file; each line is an element, so that long ones wrap with an indent."""
    return f"<pre><code>{''.join(f'<span>{text(line)}</span>' for line in lines.rstrip().splitlines())}</code></pre>"


def table(header: tuple[str, ...], rows: list[tuple], text_columns: int = 1, caption: str = "") -> str:
    """A table whose first `text_columns` columns are text and the others numbers. Each cell knows its column's name: on a
    phone a row becomes a card."""
    kinds = ["" if i < text_columns else ' class="number"' for i in range(len(header))]
    head = "".join(f'<th scope="col"{kind}>{text(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    body = ""
    for first, *rest in rows:
        cells = zip(header[1:], kinds[1:], rest, strict=True)
        body += f'<tr><th scope="row">{text(first)}</th>'
        body += "".join(f'<td data-label="{text(name)}"{kind}>{text(cell)}</td>' for name, kind, cell in cells) + "</tr>"
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="table"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, content: str) -> str:
    """What is there for those who want it."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def chart(spec: dict, caption: str, figures: str) -> str:
    """A chart: page.js draws `spec`, which `charts` makes; the table `figures` says the same without a picture."""
    data = text(json.dumps(spec, separators=(",", ":"), allow_nan=False))
    plot = f'<div class="plot" role="img" aria-label="{text(spec["title"])}" data-chart="{data}"></div>'
    return (
        f'<figure><h3>{text(spec["title"])}</h3><div class="legend"></div>{plot}'
        f"<figcaption>{text(caption)}</figcaption>{folded('The figures as a table', figures)}</figure>"
    )
