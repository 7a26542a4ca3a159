"use strict";

// Talks to the server that this page came from, and to nothing else. A server that wants a token
// gets it from the address: http://.../#token=...

const at = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token");
const GENERIC = "generic";
let soup = null;
let current = null;
let weights = [];

function headers(json) {
  const found = json ? { "Content-Type": "application/json" } : {};
  if (token) found.Authorization = `Bearer ${token}`;
  return found;
}

async function ask(path, body) {
  const options = body
    ? { method: "POST", headers: headers(true), body: JSON.stringify(body) }
    : { headers: headers(false) };
  const response = await fetch(path, options);
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Error(answer ? answer.error.message : `the server answered ${response.status}`);
  }
  return response;
}

async function work(button, action) {
  at("error").textContent = "";
  button.disabled = true;
  try {
    await action();
  } catch (error) {
    at("error").textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

const percent = (x) => `${(100 * x).toFixed(1)}%`;

function documents() {
  return at("documents").value.split(/^---$/m).map((t) => t.trim()).filter((t) => t);
}

function element(kind, name, text) {
  const found = document.createElement(kind);
  if (name) found.className = name;
  if (text !== undefined) found.textContent = text;
  return found;
}

function showDomains() {
  const order = weights.map((_, k) => k).sort((a, b) => weights[b] - weights[a] || a - b);
  at("domains").replaceChildren(...order.map((k) => {
    const row = element("label", "bar");
    const label = element("span", "label", `${k} ${soup.domains[k]}`);
    label.title = soup.domains[k];
    const slider = element("input");
    Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.001, value: weights[k] });
    slider.setAttribute("aria-label", `weight of domain ${k}`);
    const value = element("span", "value", percent(weights[k]));
    slider.addEventListener("input", () => {
      weights[k] = Number(slider.value);
      const total = weights.reduce((a, b) => a + b, 0) || 1;
      value.textContent = percent(weights[k] / total);
      at("again").disabled = false;
    });
    row.append(label, slider, value);
    return row;
  }));
}

function showAlpha(alpha) {
  const most = Math.max(...alpha.map(Math.abs), 1e-6);
  const space = "http://www.w3.org/2000/svg";
  at("alpha").replaceChildren(...alpha.map((a, e) => {
    const row = element("div", "signed");
    const picture = document.createElementNS(space, "svg");
    picture.setAttribute("viewBox", "0 0 200 8");
    picture.setAttribute("preserveAspectRatio", "none");
    const middle = document.createElementNS(space, "line");
    for (const [name, x] of [["x1", 100], ["x2", 100], ["y1", 0], ["y2", 8]]) middle.setAttribute(name, x);
    const bar = document.createElementNS(space, "rect");
    const width = 100 * Math.abs(a) / most;
    for (const [name, x] of [["x", a < 0 ? 100 - width : 100], ["y", 1], ["width", width], ["height", 6]]) bar.setAttribute(name, x);
    bar.setAttribute("class", a < 0 ? "less" : "more");
    picture.append(middle, bar);
    row.append(element("span", "", `E${e + 1}`), picture, element("span", "value", a.toFixed(3)));
    return row;
  }));
}

function show(made) {
  current = made;
  weights = made.h.slice();
  at("made").textContent = made.documents
    ? `${made.id}: ${made.documents} documents, ${(1000 * made.seconds).toFixed(0)} ms`
    : `${made.id}: ${(1000 * made.seconds).toFixed(0)} ms`;
  at("warnings").replaceChildren(...made.warnings.map((w) => element("li", "", w)));
  at("name").textContent = made.id;
  showDomains();
  showAlpha(made.alpha);
  at("again").disabled = true;
  at("compare").disabled = at("download").disabled = false;
}

async function score() {
  const texts = documents();
  for (const side of ["specialist", "generic"]) at(`bits-${side}`).textContent = "";
  if (!texts.length) return;
  const found = {};
  for (const [side, model] of [["specialist", current.id], ["generic", GENERIC]]) {
    const answer = await ask("v1/score", { model, documents: texts });
    found[side] = (await answer.json()).total.bits_per_byte;
    at(`bits-${side}`).textContent = `${found[side].toFixed(3)} bits per byte of your texts`;
  }
  const gain = found.generic - found.specialist;
  at("bits-specialist").textContent += gain > 0 ? ` (${gain.toFixed(3)} better)` : ` (${(-gain).toFixed(3)} worse)`;
}

async function make(body) {
  show(await (await ask("v1/specialists", body)).json());
  await score();
}

async function write(side, model) {
  const place = at(`text-${side}`);
  const prompt = at("prompt").value;
  place.replaceChildren(element("span", "prompt", prompt), element("span"));
  const body = {
    model,
    prompt,
    max_tokens: Number(at("tokens").value),
    temperature: Number(at("temperature").value),
    stream: true,
  };
  const response = await ask("v1/completions", body);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      place.lastChild.textContent += found.choices[0].text;
    }
  }
}

async function download() {
  const response = await ask(`v1/specialists/${encodeURIComponent(current.id)}/download`);
  const link = element("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = `${current.id}.zip`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

at("make").addEventListener("click", () => work(at("make"), () => make({ documents: documents() })));
at("again").addEventListener("click", () => work(at("again"), () => make({ h: weights })));
at("generic").addEventListener("click", () => work(at("generic"), () => make({ h: soup.frequencies })));
at("compare").addEventListener("click", () => work(at("compare"), () =>
  Promise.all([write("specialist", current.id), write("generic", GENERIC)])));
at("download").addEventListener("click", () => work(at("download"), download));

(async () => {
  try {
    soup = await (await ask("v1/domains")).json();
    at("about").textContent = `${soup.name}, step ${soup.step}: ${soup.num_experts} experts, `
      + `${soup.domains.length} domains. Nothing is trained here: each specialist is one merge.`;
    weights = soup.frequencies.slice();
    showDomains();
  } catch (error) {
    at("error").textContent = error.message;
  }
})();
