"use strict";
// Draws the charts of the page as SVG, at the width that each has, again when it changes. Colours are those of the style
// sheet, so a change between light and dark needs no drawing. charts.py says what a chart is made of.

const SVG = "http://www.w3.org/2000/svg";

function add(parent, name, attributes = {}, words = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (words !== "") element.textContent = words;
  parent.append(element);
  return element;
}

// A number with three digits that count and its unit; microseconds above a thousand are milliseconds.
function written(value, unit) {
  if (unit === "us") return value >= 1000 ? written(value / 1000, "ms") : written(value, "µs");
  if (unit === "MB" && value > 0 && value < 1) return written(value * 1000, "kB");
  const size = Math.abs(value);
  const short = size < 1e-3 || size >= 1e6 ? value.toExponential(1).replace(".0e", "e") : String(+value.toPrecision(3));
  const digits = size === 0 ? "0" : Number.isInteger(value) && size < 1e6 ? String(value) : short;
  return unit ? `${digits} ${unit}` : digits;
}

const niceSteps = [1, 2, 2.5, 5, 10];
function linearTicks(low, high, most) {
  const raw = (high - low) / Math.max(most, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * niceSteps.find(s => s * power >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9); ++i) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

// 1, 10, 100 ...; 1, 3, 10 ... or 1, 2, 5, 10 ... where that gives too few.
function logTicks(low, high, most) {
  const found = [[1], [1, 3], [1, 2, 5]].map(factors => {
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); ++e)
      for (const f of factors) if (f * 10 ** e >= low * 0.999 && f * 10 ** e <= high * 1.001) ticks.push(+(f * 10 ** e).toPrecision(6));
    return ticks;
  });
  const fitting = found.filter(ticks => ticks.length <= most);
  const chosen = fitting.length ? fitting[fitting.length - 1] : found[0].filter((_, i, all) => i % Math.ceil(all.length / most) === 0);
  return chosen.length > 1 ? chosen : [low, high];
}

function scale(axis, low, high, from, to) {
  const f = axis.scale === "log" ? Math.log : x => x;
  const span = f(high) - f(low) || 1;
  return value => from + (to - from) * (f(value) - f(low)) / span;
}

function mark(parent, kind, x, y, r = 3.6) {
  const shapes = {
    square: `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    diamond: `M${x},${y - 1.3 * r}L${x + 1.3 * r},${y}L${x},${y + 1.3 * r}L${x - 1.3 * r},${y}z`,
    triangle: `M${x},${y - 1.2 * r}L${x + 1.2 * r},${y + r}L${x - 1.2 * r},${y + r}z`,
    cross: `M${x - r},${y - r}L${x + r},${y + r}M${x - r},${y + r}L${x + r},${y - r}`,
  };
  if (kind === "circle") return add(parent, "circle", { cx: x, cy: y, r, fill: "currentColor" });
  return add(parent, "path", { d: shapes[kind], fill: kind === "cross" ? "none" : "currentColor", stroke: "currentColor", "stroke-width": kind === "cross" ? 2 : 0 });
}

function legend(box, chart) {
  box.replaceChildren();
  if (chart.series.length < 2) return;
  for (const series of chart.series) {
    const entry = document.createElement("span");
    const swatch = add(entry, "svg", { width: 30, height: 12, class: `tone-${series.tone}`, "aria-hidden": "true" });
    if (chart.kind === "bars") add(swatch, "rect", { x: 4, y: 1, width: 22, height: 10, rx: 2, fill: "currentColor" });
    else {
      add(swatch, "line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": series.dash || "none" });
      if (series.mark) mark(swatch, series.mark, 15, 6);
    }
    entry.append(series.name);
    box.append(entry);
  }
}

// On a logarithmic axis there is no place for 0.
const shown = (axis, value) => Number.isFinite(value) && (axis.scale !== "log" || value > 0);

function lines(box, chart, width) {
  const series = chart.series.map(s => ({ ...s, points: s.points.filter(p => shown(chart.x, p[0]) && shown(chart.y, p[1])) })).filter(s => s.points.length);
  const xs = series.flatMap(s => s.points.map(p => p[0])), ys = series.flatMap(s => s.points.flatMap(p => p.slice(1).filter(v => shown(chart.y, v))));
  if (!xs.length) { box.textContent = "Every figure is 0."; return; }
  const height = Math.round(Math.min(380, Math.max(250, 0.5 * width)));
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  const log = chart.y.scale === "log";
  if (log) [low, high] = low === high ? [low / 2, high * 2] : [low / 1.12, high * 1.12];
  else [low, high] = [0, high * 1.06 || 1];
  const yTicks = (log ? logTicks : linearTicks)(low, high, 7), labels = yTicks.map(v => written(v, chart.y.unit));
  const left = 12 + 6.9 * Math.max(...labels.map(l => l.length)), right = 14, top = 26, bottom = 44;
  const reach = [...xs, ...(chart.moments || []).map(m => m.x)], span = [Math.min(...reach), Math.max(...reach)];
  const x = scale(chart.x, ...span, left + 8, width - right - 8), y = scale(chart.y, low, high, height - bottom, top);
  const svg = add(box, "svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  add(svg, "text", { x: 0, y: 12, class: "soft" }, chart.y.label);
  yTicks.forEach((v, i) => {
    add(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) });
    add(svg, "text", { class: "soft", x: left - 8, y: y(v) + 4, "text-anchor": "end" }, labels[i]);
  });
  const measured = [...new Set(xs)].sort((a, b) => a - b), room = Math.max(2, Math.floor((width - left) / 56));
  const xTicks = chart.x.scale === "log" && measured.length <= 12 ? thinned(measured, room) : linearTicks(...span, Math.min(room, 9) - 1);
  for (const v of xTicks) {
    add(svg, "line", { class: "axis", x1: x(v), x2: x(v), y1: height - bottom, y2: height - bottom + 5 });
    add(svg, "text", { class: "soft", x: x(v), y: height - bottom + 19, "text-anchor": "middle" }, written(v, chart.x.unit));
  }
  add(svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });
  add(svg, "text", { class: "soft", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, chart.x.label);
  (chart.moments || []).forEach((moment, i) => {
    const at = x(moment.x), late = at > width / 2, group = add(svg, "g", { class: `tone-${moment.tone}` });
    add(group, "line", { x1: at, x2: at, y1: top, y2: height - bottom, stroke: "currentColor", "stroke-dasharray": "2 3" });
    const words = add(group, "text", { class: "halo", x: at + (late ? -6 : 6), y: height - bottom - 10 - 17 * i, "text-anchor": late ? "end" : "start" }, moment.text);
    words.style.fill = "currentColor";
  });
  for (const s of series) {
    const group = add(svg, "g", { class: `tone-${s.tone} series` }), wide = s.points.filter(p => p.length > 2 && shown(chart.y, p[2]));
    if (wide.length > 1) {
      const up = wide.map(p => `${x(p[0])},${y(p[3])}`), down = wide.map(p => `${x(p[0])},${y(p[2])}`).reverse();
      add(group, "polygon", { points: [...up, ...down].join(" "), fill: "currentColor", opacity: 0.12 });
    }
    add(group, "polyline", { points: s.points.map(p => `${x(p[0])},${y(p[1])}`).join(" "), fill: "none", stroke: "currentColor", "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": s.dash || "none" });
    if (s.mark) s.points.forEach(p => mark(group, s.mark, x(p[0]), y(p[1])));
  }
  reader(box, svg, chart, series, x, [left, width - right, top, height - bottom]);
}

// A name with its middle left out where it has more than `most` characters: names differ at their ends.
const shortened = (name, most) => name.length <= most ? name : `${name.slice(0, Math.ceil(most / 2) - 1)}…${name.slice(-Math.floor(most / 2))}`;

// Every so manieth value, the last one always.
function thinned(values, most) {
  const step = Math.ceil(values.length / most);
  return values.filter((_, i) => (values.length - 1 - i) % step === 0);
}

// Shows the figures at the measured place that is nearest to the pointer.
function reader(box, svg, chart, series, x, [left, right, top, bottom]) {
  const line = add(svg, "line", { class: "axis", y1: top, y2: bottom, visibility: "hidden" });
  const area = add(svg, "rect", { x: left, y: top, width: Math.max(0, right - left), height: bottom - top, fill: "transparent" });
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  box.append(tip);
  const near = (points, at) => points.reduce((a, b) => Math.abs(x(b[0]) - at) < Math.abs(x(a[0]) - at) ? b : a);
  area.addEventListener("pointermove", event => {
    const at = event.clientX - svg.getBoundingClientRect().left, place = near(series.flatMap(s => s.points), at)[0];
    line.setAttribute("x1", x(place)); line.setAttribute("x2", x(place)); line.setAttribute("visibility", "visible");
    const head = document.createElement("b");
    head.textContent = `${chart.x.label}: ${written(place, chart.x.unit)}`;
    const rows = series.map(s => ({ name: s.name, point: near(s.points, x(place)) })).filter(r => chart.x.scale !== "log" || r.point[0] === place);
    rows.sort((a, b) => b.point[1] - a.point[1]);
    tip.replaceChildren(head, ...rows.map(r => Object.assign(document.createElement("div"), { textContent: `${r.name}: ${written(r.point[1], chart.y.unit)}` })));
    tip.hidden = false;
    const flip = x(place) > (left + right) / 2;
    tip.style.left = flip ? "auto" : `${x(place) + 10}px`;
    tip.style.right = flip ? `${svg.clientWidth - x(place) + 10}px` : "auto";
    tip.style.top = `${top}px`;
  });
  area.addEventListener("pointerleave", () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); });
}

function bars(box, chart, width) {
  const values = chart.rows.flatMap(row => row.values.filter(Boolean).map(v => Math.max(...v)));
  let high = Math.max(0, ...values);
  // a limit far beyond what was measured would flatten every bar: it is told in words then
  const limits = (chart.limits || []).filter(l => l.value <= 4 * high), far = (chart.limits || []).filter(l => l.value > 4 * high);
  high = Math.max(high, ...limits.map(l => l.value)) || 1;
  const longest = Math.max(...chart.rows.map(row => row.label.length)), beside = width >= 620 && longest <= 44;
  const thick = 13, gap = 3, head = beside ? 0 : 18, filled = row => row.values.filter(Boolean).length * (thick + gap);
  const left = beside ? 12 + 6.7 * longest : 0, right = width < 500 ? 92 : 112, top = limits.length || far.length ? 24 : 6, bottom = 42;
  const starts = [top];
  for (const row of chart.rows) starts.push(starts[starts.length - 1] + head + Math.max(filled(row), thick) + 12);
  const height = starts[chart.rows.length] + bottom, x = scale({}, 0, high, left, width - right);
  const svg = add(box, "svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  for (const v of linearTicks(0, high, Math.max(2, Math.floor((width - left - right) / 80)))) {
    add(svg, "line", { class: "grid", x1: x(v), x2: x(v), y1: top, y2: height - bottom });
    add(svg, "text", { class: "soft", x: x(v), y: height - bottom + 17, "text-anchor": v ? "middle" : "start" }, written(v, chart.x.unit));
  }
  add(svg, "text", { class: "soft", x: left, y: height - 4 }, chart.x.label);
  chart.rows.forEach((row, i) => {
    const y0 = starts[i] + 6, middle = y0 + (Math.max(filled(row), thick) - gap) / 2;
    let y = y0 + head;
    add(svg, "text", beside ? { x: left - 12, y: middle + 4, "text-anchor": "end" } : { x: 0, y: y0 + 11, class: "halo" }, shortened(row.label, beside ? longest : Math.floor(width / 7)));
    chart.series.forEach((series, k) => {
      const value = row.values[k];
      if (!value) return;
      const group = add(svg, "g", { class: `tone-${series.tone} series` }), [mean, low, up] = value;
      add(group, "title", {}, `${row.label}, ${series.name}: ${written(mean, chart.x.unit)}`);
      add(group, "rect", { x: left, y, width: Math.max(1.5, x(mean) - left), height: thick, rx: 2, fill: "currentColor" });
      let end = x(mean), words = written(mean, chart.x.unit);
      if (low !== undefined && up - low > 1e-3 * mean) {
        const d = `M${x(Math.max(low, 0))},${y + thick / 2}H${x(up)}m0,-4v8`;
        for (const [colour, stroke] of [["card", 4], ["text", 1.5]]) add(group, "path", { d, "stroke-width": stroke, fill: "none" }).style.stroke = `var(--${colour})`;
        end = x(up); words += ` ± ${written(+((up - low) / 2).toPrecision(2), "")}`;
      }
      add(svg, "text", { x: end + 7, y: y + thick - 2.5, class: "halo" }, words);
      y += thick + gap;
    });
  });
  add(svg, "line", { class: "axis", x1: left, x2: left, y1: top, y2: height - bottom });
  for (const limit of limits) {
    const at = x(limit.value), late = at > (left + width) / 2;
    add(svg, "line", { class: "limit", x1: at, x2: at, y1: top - 4, y2: height - bottom });
    add(svg, "text", { class: "limit", x: at + (late ? 4 : -4), y: 14, "text-anchor": late ? "end" : "start" }, limit.text);
  }
  for (const limit of far) add(svg, "text", { class: "limit", x: width, y: 14, "text-anchor": "end" }, `${limit.text}: beyond the edge →`);
}

function draw(box) {
  const chart = JSON.parse(box.dataset.chart), width = Math.floor(box.clientWidth);
  if (!width || box.drawn === width) return;
  box.drawn = width;
  box.replaceChildren();
  legend(box.parentElement.querySelector(".legend"), chart);
  (chart.kind === "lines" ? lines : bars)(box, chart, width);
}

const watcher = new ResizeObserver(entries => entries.forEach(entry => draw(entry.target)));
for (const box of document.querySelectorAll("[data-chart]")) { draw(box); watcher.observe(box); }
