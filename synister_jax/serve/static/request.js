// SPDX-License-Identifier: Apache-2.0
// The view of a new request: its rows, the result of their check, and the start.

import {
  $, count, duration, make, numberItem, put, scrollBox, size, visible, whole,
} from "./elements.js";
import { POLL_LIST, Refused, call, get, repeat } from "./server.js";
import { state } from "./state.js";
import { show } from "./views.js";

const MOST_BYTES = 16 * 2 ** 20, MOST_SHOWN_BYTES = 2 ** 18;

let file = null; // a file that is too large for the text field, or is not text
let checked = null;
let checking = null, watching = null, debounce = 0;
const asked = () => file || $("text").value;

export function openRequest(focus) {
  show("new", focus);
  watchModels();
  state.left.push({ stop: () => {
    watching.stop();
    checking?.stop();
    clearTimeout(debounce);
  } });
  if (file || $("text").value) changed(0);
  else showCheck(null);
}

const isStarting = (model) => !model.ready && !model.problem;

// Asks for the models until each model is open or has a problem.
function watchModels() {
  watching?.stop();
  watching = repeat(async (signal) => {
    fillModels(await get("/api/models", signal));
    return state.models.some(isStarting) ? POLL_LIST : null;
  }, (error) => put($("model-problem"), error.message));
}

export function fillModels(found) {
  if (JSON.stringify(found) === JSON.stringify(state.models) && $("model").length) return;
  const before = $("model").value;
  state.models = found;
  $("model").replaceChildren(...state.models.map((model) =>
    make("option", { value: model.name }, visible(model.title) + (model.problem
      ? " (cannot be used)" : model.ready ? "" : " (starting)"))));
  const usable = found.find((m) => m.ready) || found.find((m) => !m.problem);
  const chosen = found.find((m) => m.name === before) || usable || found[0];
  if (chosen) $("model").value = chosen.name;
  fillSources();
}

const chosenModel = () => state.models.find((m) => m.name === $("model").value);
const chosenSource = () =>
  chosenModel()?.sources.find((s) => s.name === $("source").value);

export function fillSources() {
  const model = chosenModel(), before = $("source").value;
  const sources = model ? model.sources : [];
  $("source").replaceChildren(...sources.map((source) =>
    make("option", { value: source.name }, visible(source.title))));
  if (sources.some((source) => source.name === before)) $("source").value = before;
  const problem = model ? model.problem : "The service has no model; add a model to models.toml.";
  put($("model-problem"), problem ? visible(problem) : "");
  tellUnits();
}

export function tellUnits() {
  const source = chosenSource();
  const neurons = source && (source.neurons
    ? `Give neurons as ${source.neuron}s.`
    : "This source cannot look up neurons; give positions.");
  put($("units"), source ? `x, y and z are in ${visible(source.units)}. ${neurons}` : "");
  changed(0);
}

function query() {
  const values = { model: $("model").value, source: $("source").value };
  if ($("kind").value) values.kind = $("kind").value;
  return new URLSearchParams(values);
}

export function changed(wait = 600) {
  checking?.stop();
  clearTimeout(debounce);
  checked = null;
  $("start").disabled = true;
  put($("start-problem"), "");
  const empty = file ? file.size === 0 : !$("text").value.trim();
  if (state.shown !== "new" || empty || !$("source").value) {
    if (state.shown === "new") showCheck(null);
    return;
  }
  put($("verdict"), "Checking…");
  $("verdict").className = "";
  debounce = setTimeout(() => {
    const content = asked();
    checking = repeat(async (signal) => {
      if (new Blob([content]).size > MOST_BYTES) {
        throw new Refused(413, "The text is larger than 16 MiB; send it in parts.", null, 0);
      }
      const path = `/api/checks?${query()}`;
      showCheck((await call("POST", path, content, signal)).body);
      return null;
    }, (error) => {
      showCheck(null);
      $("verdict").className = "bad";
      put($("verdict"), error.message);
    });
  }, wait);
}

// Shows the result of a check. The user can start the request only when the model is
// open. `fillModels` checks the rows again when a model changes.
function showCheck(check) {
  checked = check;
  const errors = check ? check.error_count : 0;
  const warnings = check ? check.warning_count : 0;
  const model = chosenModel();
  const starting = model !== undefined && isStarting(model);
  $("start").disabled = !check || errors > 0 || starting;
  $("verdict").className = !check ? "" : errors ? "bad" : "good";
  const also = warnings ? ` and ${count(warnings, "warning")}` : "";
  put($("verdict"), !check ? "The page checks the rows as soon as you give rows."
    : errors ? `${count(errors, "error")}${also}. Correct the text; the page then checks the rows again.`
      : `No error${also}. ${starting
        ? "The model is being opened; you can start in a moment."
        : "You can start the request."}`);
  const sizes = [];
  if (check && !errors) {
    const { rows, neurons, seconds } = check;
    if (check.kind === "positions") sizes.push([whole(rows), rows === 1 ? "row" : "rows"]);
    if (neurons) sizes.push([whole(neurons), neurons === 1 ? "neuron" : "neurons"]);
    if (seconds !== null) sizes.push([`≈ ${duration(seconds)}`, "estimated time"]);
  }
  $("sizes").replaceChildren(...sizes.map(numberItem));
  const parts = [];
  if (errors) parts.push(problemTable("Errors", check.errors, errors));
  if (warnings) parts.push(problemTable("Warnings", check.warnings, warnings));
  if (errors) parts.push(saveButton(check));
  $("problems").replaceChildren(...parts);
}

function problemTable(name, problems, total) {
  const few = total > problems.length ? `, the first ${whole(problems.length)}` : "";
  const body = make("tbody");
  for (const problem of problems) {
    const row = body.insertRow();
    row.append(make("td", {}, problem.line && !file ? lineButton(problem.line)
      : problem.line ? whole(problem.line) : "all"));
    row.append(make("td", { class: "text name" }, visible(problem.column || "–")));
    row.append(make("td", { class: "text long" }, visible(problem.message)));
  }
  const heads = ["line", "column", "what is wrong"].map((text) =>
    make("th", { scope: "col", class: "text" }, text));
  return scrollBox(name, make("table", {},
    make("caption", {}, `${name}: ${whole(total)}${few}`),
    make("thead", {}, make("tr", {}, ...heads)), body));
}

function lineButton(line) {
  const label = `go to line ${line}`;
  const button = make("button", { type: "button", class: "plain", "aria-label": label },
    whole(line));
  button.addEventListener("click", () => goToLine(line));
  return button;
}

function goToLine(line) {
  const text = $("text"), lines = text.value.split("\n");
  const start = lines.slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
  text.focus();
  text.setSelectionRange(start, start + (lines[line - 1] || "").length);
  const height = parseFloat(getComputedStyle(text).lineHeight);
  text.scrollTop = Math.max(0, (line - 4) * height);
}

// A spreadsheet could run a cell as a formula. Such a cell gets a ' at its beginning.
function csvCell(value) {
  const text = String(value);
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return `"${safe.replaceAll('"', '""')}"`;
}

function saveButton(check) {
  const button = make("button", { type: "button" }, "Save this list");
  button.addEventListener("click", () => {
    const rows = [["kind", "line", "column", "message"]];
    for (const kind of ["errors", "warnings"]) {
      for (const p of check[kind]) rows.push([kind.slice(0, -1), p.line, p.column, p.message]);
    }
    const text = rows.map((row) => row.map(csvCell).join(",") + "\r\n").join("");
    const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    make("a", { href: url, download: "problems.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
  return make("p", {}, button);
}

export async function take(given) {
  if (!given) return;
  let text = null;
  if (given.size <= MOST_SHOWN_BYTES) {
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await given.arrayBuffer());
    } catch {
      text = null; // the server explains what is wrong with the file
    }
  }
  clearRequest();
  if (text === null) {
    file = given;
    $("file").firstElementChild.textContent = `${visible(given.name)}, ${size(given.size)}`;
  } else {
    $("text").value = text;
  }
  $("file").hidden = file === null;
  $("text").hidden = file !== null;
  if (!$("name").value) $("name").value = given.name.slice(0, 100);
  changed(0);
}

export function clearRequest() {
  file = null;
  $("text").value = $("chosen").value = $("name").value = "";
  $("fresh").checked = false;
  $("text").hidden = false;
  $("file").hidden = true;
}

export async function start(event) {
  event.preventDefault();
  if (!checked || $("start").disabled) return;
  $("start").disabled = true;
  put($("start-problem"), "");
  const values = query();
  if ($("name").value.trim()) values.set("name", $("name").value.trim());
  if ($("fresh").checked) values.set("fresh", "true");
  try {
    const { status, body } = await call("POST", `/api/jobs?${values}`, asked());
    clearRequest();
    if (status === 200) state.parting = "You have asked for the same before. This is the earlier request.";
    location.hash = `job=${body.id}`;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.body && error.body.check) showCheck(error.body.check);
    else $("start").disabled = false;
    put($("start-problem"), error.message);
    // After 503, the server may be opening the models again.
    if (error.status === 503 && state.shown === "new") watchModels();
  }
}
