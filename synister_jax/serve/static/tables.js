// SPDX-License-Identifier: Apache-2.0
// Tables with pages. The server searches the rows and returns one page at a time.

import { $, count, make, put, scrollBox, visible, whole } from "./elements.js";
import { get, repeat } from "./server.js";

const PAGE_ROWS = 25;

export const NEURON_HEADS = [
  "neuron", "called", "synapses per called class", "synapses", "predicted",
];
export const SYNAPSE_HEADS = [
  "synapse", "called", "probability", "probability of each class", "neuron",
  "status", "x nm", "y nm", "z nm",
];
const WORDS = new Set([
  "status", "called", "synapses per called class", "probability of each class",
]);

export function paged(section, path, key, what, heads, line) {
  section.querySelector(".scroll")?.remove();
  section.querySelector(".pages")?.remove();
  const form = section.querySelector("form");
  form.reset();
  const body = make("tbody"), output = make("output"), head = make("tr");
  head.append(...heads.map((text) =>
    make("th", { scope: "col", ...(WORDS.has(text) ? { class: "text" } : {}) }, text)));
  const back = make("button", { type: "button" }, "‹ Previous");
  const next = make("button", { type: "button" }, "Next ›");
  section.append(
    scrollBox(`${what}s`, make("table", {}, make("thead", {}, head), body)),
    make("p", { class: "pages" }, back, next, output));
  let offset = 0, loading = null, timer = 0;
  function load() {
    loading?.stop();
    const values = new URLSearchParams({ offset, limit: PAGE_ROWS });
    for (const field of form.querySelectorAll("[data-query]")) {
      if (field.value.trim()) values.set(field.dataset.query, field.value.trim());
    }
    loading = repeat(async (signal) => {
      const found = await get(`${path}?${values}`, signal);
      body.replaceChildren(...found[key].map(line));
      section.hidden = found.total === 0 && [...values].length === 2; // no filter
      const last = offset + found[key].length;
      put(output, found.total === 0 ? `no ${what}`
        : `${whole(offset + 1)} to ${whole(last)} of ${count(found.total, what)}`);
      back.disabled = offset === 0;
      next.disabled = last >= found.total;
      return null;
    }, (error) => {
      body.replaceChildren();
      put(output, error.message);
    });
  }
  function again(wait) {
    clearTimeout(timer);
    timer = setTimeout(() => { offset = 0; load(); }, wait);
  }
  const turn = (rows) => { offset = Math.max(0, offset + rows); load(); };
  back.addEventListener("click", () => turn(-PAGE_ROWS));
  next.addEventListener("click", () => turn(PAGE_ROWS));
  form.oninput = () => again(250);
  form.onsubmit = (event) => { event.preventDefault(); again(0); };
  load();
  return { stop: () => { loading?.stop(); clearTimeout(timer); } };
}

const cell = (text, kind) => make("td", kind ? { class: kind } : {}, text);

export function neuronRow(neuron, classes) {
  const show = make("button", {
    type: "button", class: "plain", "aria-label": `synapses of neuron ${neuron.neuron_id}`,
  }, neuron.neuron_id);
  show.addEventListener("click", () => {
    $("of-neuron").value = neuron.neuron_id;
    $("of-neuron").dispatchEvent(new Event("input", { bubbles: true }));
    $("of-neuron").focus();
  });
  const called = neuron.called === null ? "–" : visible(neuron.called);
  const mark = neuron.uncertain ? "≈ " : "";
  const td = cell(mark + called, "text");
  if (mark) td.append(make("span", { class: "unseen" }, " (uncertain)"));
  const name = make("td", {}, show);
  return make("tr", {}, name, td,
    make("td", {}, stack(classes, neuron.counts, neuron.predicted, whole)),
    cell(whole(neuron.synapses)), cell(whole(neuron.predicted)));
}

export function synapseRow(row, classes) {
  const nm = (x) => cell(x === null ? "–" : whole(Math.round(x)));
  const probability = row.called === null ? null : row.probabilities[row.called];
  const share = (p) => p.toFixed(2);
  const bar = probability === null ? "" : stack(classes, row.probabilities, 1, share);
  return make("tr", {},
    cell(row.position_id), cell(row.called === null ? "–" : visible(row.called), "text"),
    cell(probability === null ? "–" : probability.toFixed(3)), make("td", {}, bar),
    cell(row.neuron_id ?? "–"), cell(visible(row.status.replaceAll("_", " ")), "text"),
    nm(row.x), nm(row.y), nm(row.z));
}

// A bar divided by class. Its label has the numbers, for screen readers.
function stack(classes, values, total, written) {
  const named = classes.filter((c) => values[c.name]).map((c) =>
    `${visible(c.short)} ${written(values[c.name])}`).join(", ");
  const bar = make("div", { class: "stack", role: "img", "aria-label": named, title: named });
  for (const c of classes) {
    if (!values[c.name]) continue;
    const piece = make("i", { class: `c${c.colour}` });
    piece.style.width = `${(100 * values[c.name]) / total}%`;
    bar.append(piece);
  }
  return bar;
}
