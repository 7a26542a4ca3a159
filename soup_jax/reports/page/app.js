"use strict";

// Draws the numbers that the page holds. Texts come from configs, paths and labels: they become
// text nodes, never HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const state = { axis: "tokens", log: false, unit: "loss", hidden: new Set() };
const redraws = [];
const redraw = () => redraws.forEach((draw) => draw());
const several = data.groups.length > 1;

// A number that JSON cannot hold comes as a text: NaN, Infinity, -Infinity.
const finite = (x) => typeof x === "number";
const broken = (x) => typeof x === "string";
const shown = (group) => !state.hidden.has(group);

function element(kind, name, text) {
  const found = document.createElement(kind);
  if (name) found.className = name;
  if (text !== undefined && text !== null) found.textContent = text;
  return found;
}

function drawn(kind, attributes, ...children) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  found.append(...children);
  return found;
}

function coloured(item, number) {
  const turn = (360 * number) / data.groups.length;
  item.style.setProperty("--colour", data.groups.length <= 10 ? `var(--c${number})`
    : `light-dark(oklch(0.55 0.15 ${turn}), oklch(0.78 0.13 ${turn}))`);
  return item;
}

function ofKind(item, kind) {
  item.style.setProperty("--colour", `var(--c${data.kinds.indexOf(kind)})`);
  return item;
}

function groupName(number) {
  const found = element("span", "group");
  found.append(coloured(element("span", "swatch"), number), data.groups[number].label);
  return found;
}

// A note, in which `words` are code.
function note(place, text) {
  place.replaceChildren(...text.split("`").map((part, i) => (i % 2 ? element("code", "", part) : part)));
}

// ---- numbers as text

const minus = (text) => text.replace("-", "\u2212");

function fixed(x, digits = 4) {
  if (x === null || x === undefined) return "";
  return broken(x) ? minus(x) : minus(x.toFixed(digits));
}

function short(x) {
  if (x === null || x === undefined) return "";
  if (broken(x)) return minus(x);
  const size = Math.abs(x);
  for (const [unit, value] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= value) return minus(`${Number((x / value).toPrecision(4))}${unit}`);
  }
  if (size !== 0 && size < 1e-3) return minus(x.toExponential(2).replace(/\.?0+e/, "e"));
  return minus(String(Number(x.toPrecision(4))));
}

const counted = (x) => (x === null || x === undefined ? "" : x.toLocaleString("en"));
const percent = (x) => (finite(x) ? `${(100 * x).toFixed(1)}%` : "");

function duration(hours) {
  if (hours >= 1) return `${Number(hours.toPrecision(3))} h`;
  if (hours * 60 >= 1) return `${Number((hours * 60).toPrecision(3))} min`;
  return `${Number((hours * 3600).toPrecision(3))} s`;
}

// ---- tables that sort

// columns: {title, note, number, value(row), cell(row)}; `cell` gives a text or an element.
function table(place, { label, columns, rows, sort, foot = [] }) {
  const scroll = element("div", "scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", label);
  const made = element("table");
  const [head, body, tail] = ["thead", "tbody", "tfoot"].map((kind) => element(kind));
  let [by, falling] = sort;

  const filled = (row, header) => {
    const line = element("tr");
    columns.forEach((column, i) => {
      const cell = element(header && i === 0 ? "th" : "td", column.number ? "number" : "text");
      if (header && i === 0) cell.scope = "row";
      const found = column.cell(row);
      if (found !== null && found !== undefined) cell.append(found);
      line.append(cell);
    });
    return line;
  };
  const order = (a, b) => {
    const [x, y] = [columns[by].value(a), columns[by].value(b)];
    const [missing, other] = [x === null || x === undefined, y === null || y === undefined];
    if (missing || other) return missing - other;
    if (finite(x) !== finite(y) && columns[by].number) return finite(x) - finite(y); // NaN first
    const found = finite(x) ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return falling ? -found : found;
  };
  const fill = () => {
    body.replaceChildren(...rows.filter((row) => row.group === undefined || shown(row.group))
      .sort(order).map((row) => filled(row, true)));
    tail.replaceChildren(...foot.filter((row) => shown(row.group)).map((row) => filled(row, true)));
    [...head.firstChild.children].forEach((cell, i) =>
      cell.setAttribute("aria-sort", i !== by ? "none" : falling ? "descending" : "ascending"));
  };
  const titles = element("tr");
  columns.forEach((column, i) => {
    const cell = element("th", column.number ? "number" : "");
    cell.scope = "col";
    const button = element("button", "", column.title);
    button.type = "button";
    if (column.note) button.title = column.note;
    button.addEventListener("click", () => {
      [by, falling] = [i, i === by ? !falling : Boolean(column.falling)];
      fill();
    });
    cell.append(button);
    titles.append(cell);
  });
  head.append(titles);
  made.append(head, body, tail);
  scroll.append(made);
  place.append(scroll);
  fill();
  return fill;
}

const runColumn = { title: "Run", value: (r) => r.group, cell: (r) => groupName(r.group) };

const signed = (x, digits = 4) => (x > 0 ? "+" : "") + fixed(x, digits);

// [mean, smallest, largest] of some runs
function spread(values, { gain = false } = {}) {
  if (!values) return "";
  const [mean, low, high] = values;
  const sign = gain ? signed : fixed;
  const cell = element("span", broken(mean) ? "broken" : "", sign(mean));
  if (gain && finite(mean)) cell.className = mean > 0 ? "better" : mean < 0 ? "worse" : "";
  if (finite(mean) && low !== high) cell.append(element("small", "", `${sign(low)} to ${sign(high)}`));
  return cell;
}

// ---- what is shown

const axisNames = { tokens: "tokens", step: "steps", hours: "time of training" };

function choice(place, name, options, chosen, pick) {
  for (const [value, text] of options) {
    const label = element("label");
    const input = element("input");
    Object.assign(input, { type: "radio", name, value, checked: value === chosen });
    input.addEventListener("change", () => pick(value));
    label.append(input, text);
    place.append(label);
  }
}

function controls() {
  choice(at("axis"), "axis", Object.entries(axisNames), state.axis, (value) => { state.axis = value; redraw(); });
  const label = element("label");
  const input = element("input");
  input.type = "checkbox";
  input.id = "log";
  input.addEventListener("change", () => { state.log = input.checked; redraw(); });
  label.append(input, "logarithmic");
  at("axis").append(label);
  data.groups.forEach((group, number) => {
    const seeds = group.runs.length > 1 ? ` (${group.runs.length} runs, seeds ${group.seeds.join(", ")})` : "";
    const button = coloured(element("button"), number);
    button.type = "button";
    button.append(element("span", "swatch"), group.label + seeds);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      if (!state.hidden.delete(number)) state.hidden.add(number);
      press();
    });
    at("legend").append(button);
  });
  const press = () => {
    [...at("legend").querySelectorAll("[aria-pressed]")].forEach((button, i) => button.setAttribute("aria-pressed", String(shown(i))));
    redraw();
  };
  for (const [text, hidden] of data.groups.length > 3 ? [["all", []], ["none", data.groups.map((_, i) => i)]] : []) {
    const button = element("button", "plain noprint", text);
    button.type = "button";
    button.addEventListener("click", () => { state.hidden = new Set(hidden); press(); });
    at("legend").append(button);
  }
  at("runs-shown").hidden = !several && data.groups[0].runs.length < 2;
}

// ---- curves

function positions(curve) {
  const per = data.groups[curve.group].tokens_per_step;
  if (state.axis === "hours") return curve.hours;
  return state.axis === "tokens" ? curve.step.map((s) => s * per) : curve.step;
}

const axisText = (x) => (state.axis === "hours" ? duration(x) : short(x));

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= rough) || rough;
  const found = [];
  for (let i = Math.ceil(low / size); i * size <= high + size * 1e-9; i += 1) found.push(i * size);
  return found;
}

function powers(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); 10 ** e <= high; e += 1) {
    for (const n of [1, 2, 5]) if (n * 10 ** e >= low && n * 10 ** e <= high) found.push(n * 10 ** e);
  }
  return found.length > 7 ? found.filter((x) => Number.isInteger(Math.log10(x) + 1e-12) || String(x)[0] === "1") : found;
}

// At round numbers of the unit in which they are read.
function marksOf(low, high, count) {
  const unit = state.axis !== "hours" || high >= 2 ? 1 : high * 60 >= 2 ? 60 : 3600;
  const [from, to] = [low * unit, high * unit];
  const found = state.log ? powers(from, to) : [];
  return (found.length > 2 ? found : ticks(from, to, count)).map((t) => t / unit);
}

function chart(place, about) {
  const figure = element("figure");
  figure.dataset.chart = about.id;
  const caption = element("figcaption", "", about.title);
  const unit = element("span");
  caption.append(" ", unit);
  const picture = drawn("svg", { role: "img", tabindex: 0 });
  const tip = element("div", "tip");
  tip.hidden = true;
  tip.setAttribute("role", "status");
  figure.append(caption, picture, tip);
  const names = [...new Set(about.curves.map((c) => c.series))].filter((name) => name);
  if (names.length > 1) figure.append(element("p", "key", `solid: ${names[0]}, dashed: ${names[1]}`));
  place.append(figure);
  const height = 230;
  const edge = { left: 52, right: 14, top: 14, bottom: 24 };
  let [curves, scaleX, scaleY, cursor, right] = [[], null, null, null, 0];

  function draw() {
    const width = Math.max(Math.round(picture.getBoundingClientRect().width) || 400, 200);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    curves = about.curves.filter((c) => shown(c.group)).map((c) => ({ ...c, x: positions(c) }));
    const all = curves.flatMap((c) => c.x).filter((x) => !state.log || x > 0);
    const values = curves.flatMap((c) => [...(c.low || c.mean), ...(c.high || [])]);
    picture.replaceChildren();
    unit.textContent = `${about.unit}${about.unit ? ", " : ""}over ${axisNames[state.axis]}`;
    right = width - edge.right;
    tip.hidden = true;
    if (!all.length) {
      picture.append(drawn("text", { x: width / 2, y: height / 2, "text-anchor": "middle" },
        curves.some((c) => c.marks.length) ? `not finite from step ${Math.min(...curves.flatMap((c) => c.marks))} on` : "nothing to draw"));
      [scaleX, scaleY] = [null, null];
      summarize();
      return;
    }
    const wide = (low, high) => (low === high ? [low - (Math.abs(low) || 1) * 0.05, high + (Math.abs(high) || 1) * 0.05] : [low, high]);
    const least = (list) => list.reduce((a, b) => Math.min(a, b), Infinity);
    const most = (list) => list.reduce((a, b) => Math.max(a, b), -Infinity);
    let [x0, x1] = [state.log ? least(all) : 0, most(all)];
    if (x0 === x1) x1 = x0 === 0 ? 1 : x0 * 1.1;
    let [y0, y1] = wide(least(values), most(values));
    [y0, y1] = [y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0)];
    const inner = { width: width - edge.left - edge.right, height: height - edge.top - edge.bottom };
    const along = state.log ? (x) => Math.log(x / x0) / Math.log(x1 / x0) : (x) => (x - x0) / (x1 - x0);
    scaleX = (x) => edge.left + inner.width * along(x);
    scaleY = (y) => edge.top + inner.height * (1 - (y - y0) / (y1 - y0));
    for (const y of ticks(y0, y1, 4)) {
      picture.append(drawn("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: scaleY(y), y2: scaleY(y) }),
        drawn("text", { x: edge.left - 6, y: scaleY(y) + 4, "text-anchor": "end" }, short(y)));
    }
    for (const x of marksOf(x0, x1, Math.max(inner.width / 65, 2))) {
      picture.append(drawn("text", { x: scaleX(x), y: height - 6, "text-anchor": scaleX(x) > width - 30 ? "end" : "middle" }, axisText(x)));
    }
    if (y0 < 0 && y1 > 0) picture.append(drawn("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: scaleY(0), y2: scaleY(0) }));
    for (const curve of curves) drawCurve(curve);
    summarize();
  }

  function drawCurve(curve) {
    const full = data.groups[curve.group].runs.length;
    const own = coloured(drawn("g", { "data-group": curve.group }), curve.group);
    const inside = curve.x.map((x, i) => i).filter((i) => !state.log || curve.x[i] > 0);
    const place = (i, values) => `${scaleX(curve.x[i]).toFixed(1)} ${scaleY(values[i]).toFixed(1)}`;
    if (curve.low && inside.length > 1) {
      const outline = [...inside.map((i) => place(i, curve.high)), ...inside.map((i) => place(i, curve.low)).reverse()];
      own.append(drawn("path", { class: "band", d: `M${outline.join("L")}Z` }));
    }
    // Cut where a value between two points is not finite, and paler where runs are missing.
    const parts = [];
    inside.forEach((i, n) => {
      const before = inside[n - 1];
      const fewer = Boolean(curve.runs && curve.runs[i] < full);
      const gap = n > 0 && curve.marks.some((s) => s > curve.step[before] && s < curve.step[i]);
      if (n === 0 || gap) parts.push({ fewer, points: [i] });
      else if (parts.at(-1).fewer !== fewer) parts.push({ fewer, points: [before, i] });
      else parts.at(-1).points.push(i);
    });
    for (const { fewer, points } of parts) {
      const style = `curve${curve.dashed ? " dashed" : ""}${fewer ? " fewer" : ""}`;
      own.append(drawn("path", { class: style, d: `M${points.map((i) => place(i, curve.mean)).join("L")}` }));
    }
    if (inside.length <= 30) {
      for (const i of inside) own.append(drawn("circle", { class: "dot", r: 2.2, cx: scaleX(curve.x[i]), cy: scaleY(curve.mean[i]) }));
    }
    for (const step of curve.marks) {
      const near = curve.step.findLastIndex((s) => s <= step);
      const per = data.groups[curve.group].tokens_per_step;
      const value = state.axis === "hours" ? curve.hours[Math.max(near, 0)] : state.axis === "tokens" ? step * per : step;
      const x = Math.min(Math.max(scaleX(value || 0), edge.left), right);
      const cross = drawn("path", { class: "mark", d: `M${x - 4} 4l8 8m0 -8l-8 8` });
      cross.append(drawn("title", {}, `step ${step}: not finite`));
      own.append(cross);
    }
    picture.append(own);
  }

  function summarize() {
    const ends = curves.filter((c) => c.mean.length).map((c) =>
      `${data.groups[c.group].label}${c.series ? ` ${c.series}` : ""} ends at ${short(c.mean.at(-1))}`);
    picture.setAttribute("aria-label", `${about.title}: ${ends.join("; ") || "nothing to draw"}`);
  }

  function nearest(curve, x) {
    let found = 0;
    curve.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(curve.x[found] - x)) found = i; });
    return found;
  }

  function point(x) {
    picture.querySelector(".cross")?.remove();
    cursor = x;
    if (x === null || !scaleX) { tip.hidden = true; return; }
    const here = scaleX(x);
    picture.append(drawn("line", { class: "cross", x1: here, x2: here, y1: edge.top, y2: height - edge.bottom }));
    const lines = curves.filter((c) => x >= c.x[0] && x <= c.x.at(-1)).map((curve) => {
      const i = nearest(curve, x);
      const value = curve.low && curve.low[i] !== curve.high[i]
        ? `${short(curve.mean[i])} (${short(curve.low[i])} to ${short(curve.high[i])})` : short(curve.mean[i]);
      const line = element("div");
      const name = several || curve.series ? ` ${data.groups[curve.group].label} ${curve.series}` : "";
      line.append(coloured(element("span", "swatch"), curve.group), `${value}${name}`);
      return [curve.mean[i], line];
    });
    lines.sort((a, b) => b[0] - a[0]);
    const words = { tokens: "tokens", step: "steps", hours: "" }[state.axis];
    tip.replaceChildren(element("div", "", `${axisText(x)} ${words}`), ...lines.slice(0, 12).map(([, line]) => line));
    tip.hidden = false;
    const box = picture.getBoundingClientRect();
    const [, , width] = picture.getAttribute("viewBox").split(" ").map(Number);
    const left = here * (box.width / width);
    tip.style.left = left < box.width / 2 ? `${left + 20}px` : "auto";
    tip.style.right = left < box.width / 2 ? "auto" : `${box.width - left + 20}px`;
  }

  function grid() {
    return [...new Set(curves.flatMap((c) => c.x))].filter((x) => !state.log || x > 0).sort((a, b) => a - b);
  }

  picture.addEventListener("pointermove", (event) => {
    const steps = grid();
    if (!scaleX || !steps.length) return;
    const box = picture.getBoundingClientRect();
    const [, , width] = picture.getAttribute("viewBox").split(" ").map(Number);
    const here = (event.clientX - box.left) * (width / box.width);
    point(steps.reduce((a, b) => (Math.abs(scaleX(b) - here) < Math.abs(scaleX(a) - here) ? b : a)));
  });
  picture.addEventListener("pointerleave", () => point(null));
  picture.addEventListener("blur", () => point(null));
  picture.addEventListener("keydown", (event) => {
    const steps = grid();
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (event.key === "Escape") point(null);
    if (!by || !steps.length) return;
    event.preventDefault();
    const now = cursor === null ? (by > 0 ? -1 : steps.length) : steps.indexOf(cursor);
    point(steps[Math.min(Math.max(now + by, 0), steps.length - 1)]);
  });
  return draw;
}

function charts() {
  const bands = data.groups.some((group) => group.runs.length > 1)
    ? "Runs that differ in the seed alone are one line, their mean; its band goes from the smallest to the largest, and the line is paler where not all of them have come. " : "";
  let text = `${bands}Nothing is smoothed: a point is the mean over the steps since the point before. `
    + "Of a long run each stretch is drawn by its smallest and its largest point. Time of training is the sum of the step times, "
    + "with compiling and saving, without evaluations. A cross at the top is a number that is not finite. Arrow keys read a chart that has the focus.";
  const drawnOnes = data.charts.filter((c) => c.curves.length);
  const draws = drawnOnes.map((about) => chart(at("charts"), about));
  const missing = data.charts.filter((c) => !c.curves.length && ["validation", "specialists"].includes(c.id));
  if (missing.length) text += " There are no evaluations during training: `evaluate.every_steps` is 0, or the first is yet to come.";
  note(at("curves-note"), text);
  redraws.push(...draws);
  let width = 0;
  new ResizeObserver((entries) => {
    const now = Math.round(entries[0].contentRect.width);
    if (now !== width) draws.forEach((draw) => draw());
    width = now;
  }).observe(at("charts"));
  draws.forEach((draw) => draw());
}

// ---- specialists

const against = () => data.specialists.columns.filter((c) => !["specialist", "generic_h", "shared"].includes(c));
const gainColumns = () => [...(data.specialists.columns.includes("generic_h") ? ["generic_h"] : []), ...against()];

function source(found) {
  const part = found.part === "final" ? "the final part of the documents, used for no choice" : `the ${found.part} part of the documents`;
  const steps = found.steps.length ? `, step ${found.steps.join(", ")}` : "";
  const runs = found.all > 1 ? `, ${found.runs} of ${found.all} runs` : "";
  const older = found.older.length ? `; OLDER than the last step of ${found.older.join(", ")}` : "";
  return `${found.file}, ${part}${steps}${runs}${older}.`;
}

function sourceText(sources) {
  const texts = [...new Set(sources.map(source))];
  if (texts.length < 2) return `The numbers are those of ${texts[0]}`;
  return texts.map((text) => `${sources.filter((s) => source(s) === text).map((s) => data.groups[s.group].label).join("; ")}: ${text}`).join(" ");
}

function specialists() {
  const { columns, rows, averages, sources } = data.specialists;
  if (!rows.length) {
    note(at("specialists-note"), "No run has an evaluation. `soup-jax evaluate --workdir=RUN --specialists='DIR/*.jsonl'` makes one and leaves it in the run.");
    at("units-shown").hidden = true;
    return;
  }
  note(at("specialists-note"), "Lower is better. A gain is the loss of the other column minus the specialist's: "
    + "below zero the specialist is worse. The worst gain comes first. Of several seeds: the mean, and from the smallest to the largest. "
    + sourceText(sources));
  choice(at("units"), "unit", [["loss", "nats per token"], ["bits_per_byte", "bits per byte"]], state.unit, (value) => { state.unit = value; redraw(); });
  const notes = { specialist: "the soup at the domain weights of that specialist", generic_h: "the same soup at the natural frequencies", shared: "S alone" };
  const loss = (c) => ({
    title: c, number: true, note: notes[c] || `compared with: ${c}`,
    value: (r) => r[state.unit][c]?.[0], cell: (r) => spread(r[state.unit][c]),
  });
  const gain = (c) => ({
    title: `gain over ${c}`, number: true,
    value: (r) => r[`${state.unit}_gain`][c]?.[0], cell: (r) => spread(r[`${state.unit}_gain`][c], { gain: true }),
  });
  const all = [
    { title: "Specialist", value: (r) => r.name, cell: (r) => r.name },
    ...(several ? [runColumn] : []),
    ...columns.map(loss),
    ...gainColumns().map(gain),
    { title: "Tokens", number: true, falling: true, note: "scored", value: (r) => r.tokens, cell: (r) => counted(r.tokens) },
    { title: "Left out", number: true, falling: true, note: "documents that are in the training text", value: (r) => r.documents_in_training, cell: (r) => counted(r.documents_in_training) },
  ];
  const worst = all.findLastIndex((column) => column.title.startsWith("gain over"));
  redraws.push(table(at("specialists"), { label: "Specialists", columns: all, rows, foot: averages, sort: [Math.max(worst, 0), false] }));
}

function glance() {
  const { rows, averages } = data.specialists;
  const worst = (group, column) => rows.filter((r) => r.group === group && r.loss_gain[column])
    .sort((a, b) => finite(a.loss_gain[column][0]) - finite(b.loss_gain[column][0]) || a.loss_gain[column][0] - b.loss_gain[column][0])[0];
  const loss = (runs) => {
    const found = runs.filter((r) => r.loss !== null && r.loss !== undefined).map((r) => r.loss);
    if (!found.length) return null;
    const bad = found.find(broken);
    return bad ? [bad, bad, bad] : [found.reduce((a, b) => a + b, 0) / found.length, Math.min(...found), Math.max(...found)];
  };
  const average = (row, column, of = "loss") => averages.find((r) => r.group === row.group)?.[of][column];
  const gains = gainColumns();
  const columns = [
    { ...runColumn },
    { title: "Seeds", value: (r) => r.seeds, cell: (r) => r.seeds },
    { title: "Steps", number: true, falling: true, value: (r) => r.step, cell: (r) => {
      const cell = element("span", "", `${counted(r.step)} of ${counted(r.all)}`);
      if (r.behind.length) cell.append(element("small", "", `without ${r.behind.join(", ")}`));
      return cell;
    } },
    { title: "Tokens", number: true, falling: true, value: (r) => r.tokens, cell: (r) => short(r.tokens) },
    { title: "Training loss", number: true, note: "the last line, of the runs that have come farthest", value: (r) => r.loss?.[0], cell: (r) => spread(r.loss) },
    ...(rows.length ? [
      { title: "Specialists", number: true, note: "average of the sets", value: (r) => average(r, "specialist")?.[0], cell: (r) => spread(average(r, "specialist")) },
      ...gains.map((c) => ({
        title: `Gain over ${c}`, number: true, falling: true, note: "average of the sets, and the worst of them",
        value: (r) => average(r, c, "loss_gain")?.[0],
        cell: (r) => {
          const mean = average(r, c, "loss_gain");
          if (!mean || !data.groups[r.group].experts) return ""; // one model, whatever h
          const cell = spread(mean, { gain: true });
          const found = worst(r.group, c);
          if (found) cell.append(element("small", "", `worst ${signed(found.loss_gain[c][0])} ${found.name}`));
          return cell;
        },
      }))] : []),
  ];
  const lines = data.groups.map((group, number) => {
    const own = data.runs.filter((r) => r.group === number);
    const step = Math.max(...own.map((r) => r.step));
    const farthest = own.filter((r) => r.step === step); // losses at different steps have no mean
    const behind = own.filter((r) => r.step < step).map((r) => `seed ${r.seed} at ${counted(r.step)}`);
    return { group: number, seeds: group.seeds.join(", "), step, behind, all: own[0].num_steps, tokens: step * group.tokens_per_step, loss: loss(farthest) };
  });
  redraws.push(table(at("glance"), { label: "At a glance", columns, rows: lines, sort: [0, false] }));
}

// ---- coefficients

function heat(place, run) {
  const names = Object.keys(run.alpha);
  const count = run.alpha[names[0]].length;
  const most = Math.max(...names.flatMap((n) => run.alpha[n].filter(finite).map(Math.abs)), 1e-9);
  const read = element("p", "read noprint", "Point at a cell to read it.");
  const made = element("div", "map");
  for (const name of names) {
    const label = element("span", "name", name);
    label.title = name;
    const picture = drawn("svg", { viewBox: `0 0 ${count} 1`, preserveAspectRatio: "none", role: "img" });
    const top = run.alpha[name].map((a, e) => [finite(a) ? a : 0, e]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 3);
    picture.setAttribute("aria-label", `${name}: largest ${top.map(([a, e]) => `E${e + 1} ${fixed(a, 3)}`).join(", ")}`);
    run.alpha[name].forEach((a, e) => {
      const cell = drawn("rect", { class: "cell", x: e, y: 0, width: 1, height: 1 });
      const part = finite(a) ? (100 * Math.abs(a)) / most : 0;
      cell.style.fill = `color-mix(in oklab, var(--${a < 0 ? "less" : "more"}) ${part.toFixed(1)}%, var(--zero))`;
      const text = `${name}, expert ${e + 1}: ${fixed(a)}`;
      cell.append(drawn("title", {}, text));
      cell.addEventListener("pointerenter", () => { read.textContent = text; });
      picture.append(cell);
    });
    made.append(label, picture);
  }
  const scale = element("div", "experts");
  scale.append(element("span", "", "E1"), element("span", "", count > 1 ? `E${count}` : ""));
  made.append(element("span"), scale);
  const ramp = element("div", "row");
  ramp.append(fixed(-most, 3), element("div", "ramp"), fixed(most, 3));
  const numbers = element("details");
  numbers.append(element("summary", "", "The numbers as a table"));
  numbers.addEventListener("toggle", () => {
    if (numbers.children.length > 1) return;
    const columns = [{ title: "Specialist", value: (r) => r.name, cell: (r) => r.name },
      ...Array.from({ length: count }, (_, e) => ({ title: `E${e + 1}`, number: true, value: (r) => run.alpha[r.name][e], cell: (r) => fixed(run.alpha[r.name][e]) }))];
    table(numbers, { label: "Coefficients", columns, rows: names.map((name) => ({ name })), sort: [0, false] });
  });
  place.replaceChildren(made, ramp, read, numbers);
}

function alpha() {
  if (!data.alpha.length) {
    note(at("alpha-note"), data.groups.some((g) => g.experts)
      ? "No evaluation has kept the coefficients: earlier versions of `soup-jax evaluate` did not, nor do the evaluations during training. Evaluate the run again to see them."
      : "These runs have no experts.");
    return;
  }
  note(at("alpha-note"), "What the router gives each specialist, from its evaluation. The experts of two seeds have nothing to do with each other, so a map shows one run.");
  const place = element("div");
  if (data.alpha.length > 1) {
    const row = element("div", "row chosen");
    const label = element("label", "", "Run ");
    const select = element("select");
    data.alpha.forEach((run, i) => select.append(new Option(several ? `${run.run} (${data.groups[run.group].label})` : run.run, i)));
    select.addEventListener("change", () => heat(place, data.alpha[select.value]));
    label.append(select);
    row.append(label);
    at("alpha").append(row);
  }
  at("alpha").append(place);
  heat(place, data.alpha[0]);
}

// ---- domains

function domains() {
  if (!data.domains.length) at("domains").append(element("p", "", "The domains of these runs are not known: the runs keep no copy, and the corpus is not where their configs say."));
  data.domains.forEach((corpus) => {
    const names = corpus.met.map((m) => data.groups[m.group].label);
    const more = corpus.count > corpus.rows.length ? `; the ${corpus.rows.length} largest are listed` : "";
    const whose = data.domains.length > 1 ? `${names.join("; ")}: ` : "";
    at("domains").append(element("p", "", `${whose}${counted(corpus.count)} domains${more}. Gini coefficient of their windows ${fixed(corpus.gini, 2)} (0: all equal). `
      + "Sizes are those of the training text. Seen: how often the run has read each window of the domain, on average; loss: in its training batches, over the last tenth of the lines."));
    let met = corpus.met[0];
    const rows = corpus.rows.map((row, i) => ({ ...row, i }));
    const label = (r) => {
      const found = element("span", "", r.label);
      if (r.terms.length) found.title = r.terms.join(" ");
      return found;
    };
    const place = element("div");
    const number = (title, key, text, note) => ({ title, number: true, falling: true, note, value: (r) => r[key], cell: (r) => text(r[key]) });
    const columns = [
      { title: "Domain", number: true, value: (r) => r.domain, cell: (r) => String(r.domain) },
      { title: "Label", value: (r) => r.label, cell: label },
      number("Share", "share", percent, "of the training windows"),
      number("Documents", "documents", counted),
      number("Windows", "windows", counted),
      number("Tokens", "tokens", counted),
      { title: "Seen", number: true, falling: true, value: (r) => met.epochs[r.i], cell: (r) => `${Number(met.epochs[r.i].toPrecision(2))} times` },
      { title: "Loss", number: true, falling: true, value: (r) => met.loss[r.i], cell: (r) => fixed(met.loss[r.i], 3) },
    ];
    let fill = null;
    if (corpus.met.length > 1) {
      const row = element("div", "row chosen");
      const choose = element("label", "", "Seen by ");
      const select = element("select");
      names.forEach((name, i) => select.append(new Option(name, i)));
      select.addEventListener("change", () => { met = corpus.met[select.value]; fill(); });
      choose.append(select);
      row.append(choose);
      at("domains").append(row);
    }
    at("domains").append(place);
    fill = table(place, { label: "Domains", columns, rows, sort: [2, true] });
  });
}

// ---- what was run

function bar(times) {
  const found = element("span");
  found.append(percent(times.goodput) + (times.recorded || times.goodput === null ? "" : " (estimate)"));
  const stripes = element("div", "bar");
  stripes.setAttribute("role", "img");
  const parts = Object.entries(times.seconds);
  stripes.title = parts.map(([kind, s]) => `${kind} ${duration(s / 3600)}, ${percent(s / times.total)}`).join("\n");
  stripes.setAttribute("aria-label", stripes.title.replaceAll("\n", "; "));
  for (const [kind, seconds] of parts) {
    const stripe = ofKind(element("span"), kind);
    stripe.style.width = `${(100 * seconds) / times.total}%`;
    stripes.append(stripe);
  }
  if (parts.length) found.append(stripes);
  return found;
}

function pairs(list) {
  const found = element("dl");
  for (const [name, value] of list) {
    if (value === "" || value === null || value === undefined) continue;
    const item = element("dd");
    item.append(value);
    found.append(element("dt", "", name), item);
  }
  return found;
}

function detail(run) {
  const found = element("details");
  found.append(element("summary", "", run.place), pairs([
    ["written last", run.written],
    ["time", Object.entries(run.times.seconds).map(([kind, s]) => `${kind} ${duration(s / 3600)}`).join(", ")],
  ]));
  for (const text of run.problems) found.append(element("p", "worse", text));
  run.starts.forEach((start, i) => {
    found.append(element("h3", "", `Start ${i + 1}`), element("pre", "", start.command || "(not recorded)"), pairs([
      ["from", `step ${start.steps[0]}, ${start.began}`],
      ["to", `step ${start.steps[1]}, ${start.until}`],
      ["end", start.end || "none is recorded: it is at work, or was killed"],
      ["devices", start.devices],
      ["versions", Object.entries(start.versions).map(([name, version]) => `${name} ${version}`).join(", ")],
    ]));
  });
  if (!run.starts.length) found.append(element("p", "", "No command is recorded: a run of an earlier version has no starts.jsonl."));
  if (run.changes.length) found.append(element("h3", "", "Changes"), element("pre", "", run.changes.join("\n")));
  return found;
}

function whatWasRun() {
  note(at("goodput-note"), "Goodput is the share of the time that went into training steps. It counts from the start of set-up to the last save, over all starts, "
    + "not the time between them. Without starts.jsonl it is an estimate from step times, without evaluations and set-up: what lines beyond 1.5 times the median step had beside steps is called slow lines.");
  const used = new Set(data.runs.flatMap((r) => Object.keys(r.times.seconds)));
  const keys = element("div", "keys");
  data.kinds.forEach((kind) => {
    if (!used.has(kind)) return;
    const item = element("span");
    item.append(ofKind(element("span", "swatch"), kind), kind);
    keys.append(item);
  });
  at("runs").append(keys);
  const columns = [
    { title: "Folder", value: (r) => r.name, cell: (r) => { const c = element("span", "", r.name); c.title = r.place; return c; } },
    ...(several ? [runColumn] : []),
    { title: "Seed", number: true, value: (r) => r.seed, cell: (r) => String(r.seed ?? "") },
    { title: "State", value: (r) => r.state, cell: (r) => r.state },
    { title: "Step", number: true, falling: true, value: (r) => r.step, cell: (r) => `${counted(r.step)} of ${counted(r.num_steps)}` },
    { title: "Loss", number: true, value: (r) => r.loss, cell: (r) => element("span", broken(r.loss) ? "broken" : "", fixed(r.loss)) },
    { title: "Tokens/s", number: true, falling: true, note: "median of the lines", value: (r) => r.tokens_per_second, cell: (r) => short(r.tokens_per_second) },
    ...(data.runs.every((r) => r.mfu === null) ? [] : [{ title: "MFU", number: true, falling: true, note: "median; of devices whose peak is known", value: (r) => r.mfu, cell: (r) => percent(r.mfu) }]),
    { title: "Time", number: true, falling: true, note: "of training, by the step times", value: (r) => r.hours, cell: (r) => duration(r.hours) },
    { title: "Goodput", value: (r) => r.times.goodput, falling: true, cell: (r) => bar(r.times) },
    ...(data.runs.every((r) => !r.starts.length) ? [] : [{ title: "Starts", number: true, falling: true, value: (r) => r.starts.length || null, cell: (r) => (r.starts.length ? String(r.starts.length) : "") }]),
  ];
  redraws.push(table(at("runs"), { label: "Runs", columns, rows: data.runs, sort: [several ? 1 : 0, false] }));
  const details = data.runs.map(detail);
  if (details.length > 12) {
    const folded = element("details");
    folded.append(element("summary", "", `Commands, starts and versions of the ${details.length} runs`), ...details);
    at("details").append(folded);
  } else at("details").append(...details);
  const commands = [...new Set(data.specialists.sources.flatMap((s) => s.commands))];
  if (commands.length) {
    const found = element("details");
    found.append(element("summary", "", "Evaluations"), ...commands.map((c) => element("pre", "", c)));
    at("details").append(found);
  }
}

function configs() {
  const rows = data.configs.map((row, i) => ({ ...row, i: row.differs ? i : i + 1e6 }));
  const columns = [
    { title: "Field", value: (r) => r.i, cell: (r) => { const c = element("code", r.differs && several ? "better" : "", r.name); c.title = r.meaning; return c; } },
    { title: "Default", value: (r) => r.default, cell: (r) => element("code", "", r.default) },
    ...(several && data.configs.some((r) => r.differs)
      ? data.groups.map((group, n) => ({ title: group.label, value: (r) => r.values[n], cell: (r) => element("code", "", r.values[n]) }))
      : [{ title: "Here", value: (r) => r.values[0], cell: (r) => element("code", "", r.values[0]) }]),
  ];
  table(at("configs"), { label: "Configs", columns, rows, sort: [0, false] });
}

function problems() {
  const found = (data.unread || []).map((text) => `left out: ${text}`);
  found.push(...data.runs.flatMap((run) => run.problems.map((text) => `${run.name}: ${text}`)));
  for (const source of data.specialists.sources) {
    if (source.older.length) found.push(`${source.file} is of step ${source.steps.join(", ")}, and ${source.older.join(", ")} went on`);
  }
  at("problems").hidden = !found.length;
  at("problems").querySelector("ul").append(...found.map((text) => element("li", "", text)));
}

// What is folded away is printed, too.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((item) => { item.open = true; });
});
addEventListener("afterprint", () => opened.forEach((item) => { item.open = false; }));

at("title").textContent = several ? `${data.name ? `${data.name}: ` : ""}${data.runs.length} runs, ${data.groups.length} configs` : data.groups[0].label;
at("about").textContent = several ? data.groups.map((g) => g.label).join("; ") : data.groups[0].runs.join(", ");
at("made").textContent = `Made ${data.made} by soup_jax ${data.version}${data.command ? `: ${data.command}` : ""}`;
controls();
problems();
glance();
charts();
specialists();
alpha();
domains();
whatWasRun();
configs();
