"""The page of `qexport report` in a real browser: drawn, readable on a phone and on a wide screen, in light and dark."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from bundle_factory import make_bundle

from qexport.reporting import parts as parts_module
from qexport.reporting import report
from qexport.reporting.page import page

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")
WIDTHS = (400, 1600)
SCHEMES = (False, True)  # dark


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(report, address of the page)"""
    folder = tmp_path_factory.mktemp("page")
    bundle = make_bundle(folder / "encoder", layers=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parts_module.SWEEP, "lengths", (16, 32, 64))
        found = report(bundle, folder / "report.html", runs=8, seq=(8, 16, 32), max_error=2.0, threads=1)
    return found, (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


# Boxes that leave the window, and texts of charts that leave theirs.
OUTSIDE = """[...document.querySelectorAll("main *")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.left < -1 || box.right > innerWidth + 1) && !e.closest("thead");
}).concat([...document.querySelectorAll(".plot text")].filter(e => {
  const box = e.getBoundingClientRect(), plot = e.closest("figure").getBoundingClientRect();
  return box.left < plot.left || box.right > plot.right || box.top < plot.top || box.bottom > plot.bottom;
})).map(e => `${e.tagName} ${e.textContent.slice(0, 60)}`)"""

# Contrast (WCAG 2) of every visible text with the background behind it, least first.
CONTRAST = """(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const found = [];
  for (const e of document.querySelectorAll("main *, nav *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    if (own && e.getClientRects().length) found.push([ratio(parts(svg ? style.fill : style.color), behind(e)), e.textContent.trim().slice(0, 40)]);
    if (svg && e.classList.contains("series")) found.push([1.5 * ratio(parts(style.color), behind(e)), "a line or bar"]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 5);
})()"""  # noqa: E501


@pytest.mark.parametrize("dark", SCHEMES, ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_drawn_without_complaints_and_readable(browser, made, width, dark):
    found, address = made
    browser.open(address, width, dark)
    assert browser.complaints() == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OUTSIDE) == []
    drawn = browser.value(
        "[...document.querySelectorAll('[data-chart]')].map(e => [JSON.parse(e.dataset.chart).title, "
        "e.querySelectorAll('svg .series').length, e.querySelector('svg').getBoundingClientRect().width / e.clientWidth])"
    )
    assert len(drawn) == 8
    for title, count, share in drawn:
        assert count > 0, title
        assert share == pytest.approx(1, abs=0.01), title
    assert browser.value("document.querySelector('h1').textContent") == "encoder"
    assert found.headline in browser.value("document.body.innerText")
    # small text needs 4.5, what is drawn 3 (counted 1.5 times)
    least, words = browser.value(CONTRAST)[0]
    assert least >= 4.5, words
    page = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, page[4:-1].split(","))) < 150) == dark


@pytest.mark.parametrize("width", WIDTHS)
def test_many_attentions_with_long_names_fit(browser, made, tmp_path, width):
    found = copy.deepcopy(made[0].to_dict())
    checked = found["parts"]["validate"]
    checked["sites"] = [copy.deepcopy(checked["sites"][0]) for _ in range(60)]
    for i, site in enumerate(checked["sites"]):
        site["module"] = f"model.language_model.decoder.layers.{i}.self_attention_of_a_model_with_long_names"
        site["propagated"] |= {"relative_error": 0.5 + i, "relative_error_ci95": [0.2 + i, 0.9 + i]}
    file = tmp_path / "many.html"
    file.write_text(page(found, json.loads((Path(found["bundle"]) / "manifest.json").read_text())))
    browser.open(file.as_uri(), width)
    assert browser.complaints() == []
    assert browser.value(OUTSIDE) == []
    names = browser.value("[...document.querySelectorAll('#accuracy .plot text')].map(e => e.textContent)")
    shown = [name for name in names if name.startswith("model.") and name.endswith("names")]
    assert len(shown) == 24
    assert "…" in shown[0] if width == 400 else f".layers.{59}." in shown[0]


def test_bars_are_as_long_as_their_figures(browser, made):
    """Drawn widths over the errors that they stand for are one factor."""
    found, address = made
    browser.open(address, 1600)
    widths = browser.value(
        "[...document.querySelectorAll('#accuracy .series rect')].map(e => e.getBoundingClientRect().width)"
    )
    sites = found.parts["validate"]["sites"]
    errors = [site[mode]["relative_error"] for site in sites for mode in ("local", "propagated")]
    factors = [width / error for width, error in zip(widths, errors, strict=True)]
    assert factors == pytest.approx([factors[0]] * len(factors), rel=0.02)


def test_lines_are_where_their_figures_are(browser, made):
    """On logarithmic axes equal ratios of the lengths are equal steps, and a longer time lies higher."""
    found, address = made
    browser.open(address, 1600)
    drawn = browser.value("document.querySelector('#latency polyline').getAttribute('points')")
    points = [tuple(map(float, point.split(","))) for point in drawn.split()]
    steps = [b[0] - a[0] for a, b in pairwise(points)]
    assert steps == pytest.approx([steps[0]] * 2)
    times = [size["models"]["classical"]["latency_ms"]["p50"] for size in found.parts["profile"]["sizes"]]
    assert sorted(range(3), key=lambda i: times[i]) == sorted(range(3), key=lambda i: -points[i][1])


def test_rows_are_cards_on_a_phone(browser, made):
    _, address = made
    cell = "document.querySelector('#accuracy td.number')"
    browser.open(address, 400)
    assert browser.value(f"getComputedStyle({cell}, '::before').content") == '"error"'
    assert browser.value(f"{cell}.getBoundingClientRect().width") > 300
    browser.open(address, 1600)
    assert browser.value(f"getComputedStyle({cell}, '::before').content") == "none"


def test_charts_follow_the_width(browser, made):
    _, address = made
    browser.open(address, 1600)
    width = "document.querySelector('#latency svg[viewBox]').getBoundingClientRect().width"
    before = browser.value(width)
    browser.call("Emulation.setDeviceMetricsOverride", width=700, height=900, deviceScaleFactor=1, mobile=False)
    assert browser.complaints() == []
    assert browser.value(width) < 700 < before


def test_the_pointer_reads_a_chart(browser, made):
    found, address = made
    browser.open(address, 1600)
    plot = "document.querySelector('#latency .plot')"
    browser.value(f"{plot}.scrollIntoView()")
    x, y = browser.value(f"(b => [b.left + .99 * b.width - 20, b.top + b.height / 2])({plot}.getBoundingClientRect())")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    words = browser.value(f"{plot}.querySelector('.tip').textContent")
    p50 = found.parts["profile"]["sizes"][-1]["models"]["converted"]["latency_ms"]["p50"]
    assert words.startswith("sequence length: 32")
    assert f"converted, p50: {float(f'{p50:.3g}'):g} ms" in words


def test_tables_say_it_without_scripts(browser, made):
    found, address = made
    browser.open(address, 1600, scripts=False)
    markup = browser.call("DOM.getOuterHTML", nodeId=browser.call("DOM.getDocument")["root"]["nodeId"])["outerHTML"]
    assert "<svg" not in markup.split("<script>")[0]
    assert "The charts are drawn by a script" in markup
    for size in found.parts["profile"]["sizes"]:
        assert f"{size['models']['converted']['latency_ms']['p99']:.3g}" in markup


def test_what_these_tests_would_see(browser, tmp_path):
    """The browser tells of errors, of exceptions, of requests and of boxes that are too wide."""
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<main><p style='width:900px;color:#eee;background:#fff'>faint</p></main><img src='http://127.0.0.1:9/a.png'>"
        "<script>console.error('told'); undefinedName()</script>"
    )
    browser.open(broken.as_uri(), 700)
    complaints = " ".join(browser.complaints())
    for words in ("told", "undefinedName", "request: http://127.0.0.1:9/a.png"):
        assert words in complaints
    assert browser.value(OUTSIDE) == ["P faint"]
    assert browser.value(CONTRAST)[0][0] < 1.5
