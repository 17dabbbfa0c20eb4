// SPDX-License-Identifier: Apache-2.0
// The page of the web service. What comes from the server goes in as text only.
"use strict";

const POLL = 1000, POLL_LIST = 2000, POLL_HIDDEN = 10_000; // milliseconds
const LONGEST_WAIT = 30_000;
const SPEAK_EVERY = 15_000; // how far a job is, for who listens
const MOST_BYTES = 16 * 2 ** 20, MOST_SHOWN_BYTES = 2 ** 18;
const PAGE_ROWS = 25;

const $ = (id) => document.getElementById(id);
const whole = (x) => x.toLocaleString("en");
const count = (x, one, many = `${one}s`) => `${whole(x)} ${x === 1 ? one : many}`;
// Characters without width, or that turn others round: a name could look like another.
const visible = (text) => String(text).replace(
  /[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/g,
  (found) => `‹U+${found.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`,
);

function make(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function duration(seconds) {
  if (seconds < 1.5) return "a second";
  if (seconds < 90) return `${Math.round(seconds)} seconds`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} minutes`;
  if (seconds < 172_800) return `${(seconds / 3600).toFixed(1)} hours`;
  return `${Math.round(seconds / 86_400)} days`;
}

function moment(text) {
  const options = { dateStyle: "medium", timeStyle: "short" };
  const shown = new Date(text).toLocaleString("en-GB", options);
  return make("time", { datetime: text }, shown);
}

function size(bytes) {
  if (bytes < 1e6) return `${whole(Math.ceil(bytes / 1e3))} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

// ---- The server

let session = null;
let models = [];

class Refused extends Error {
  constructor(status, message, body, seconds) {
    super(message);
    this.status = status;
    this.body = body;
    this.wait = 1000 * seconds; // that the server asks for
    this.passes = status === 0 || status === 429 || status >= 500; // worth another try
  }
}

function detailOf(body, status) {
  const detail = body && body.detail;
  if (typeof detail === "string") return detail;
  if (Array.isArray(detail)) return detail.map((one) => one.msg).join("; ");
  return `The server answered ${status}.`;
}

async function call(method, path, content, signal) {
  const headers = { Accept: "application/json" };
  if (method !== "GET" && session) headers["X-CSRF-Token"] = session.csrf;
  const isForm = content !== undefined && path !== "/api/session";
  if (content !== undefined) {
    headers["Content-Type"] = isForm ? "text/plain" : "application/json";
  }
  let response, body = null;
  try {
    const options = { method, headers, body: content, signal, cache: "no-store" };
    response = await fetch(path, { ...options, credentials: "same-origin" });
    if (response.status !== 204) body = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (!response || response.ok) throw new Refused(0, "The server does not answer.", null, 0);
  }
  if (response.ok) return { status: response.status, body };
  if (response.status === 401 && path !== "/api/session") signedOut();
  const seconds = Number(response.headers.get("Retry-After")) || 0;
  throw new Refused(response.status, detailOf(body, response.status), body, seconds);
}

const get = async (path, signal) => (await call("GET", path, undefined, signal)).body;

const failing = new Set(); // tasks that wait for the server to come back
const repeated = new Set();

// Calls the task again after the milliseconds that it returns, until it returns null;
// after what may pass it is called again later and later, and the page says so.
function repeat(task, refused) {
  const stopping = new AbortController();
  let timer = null, failures = 0, running = false;
  const control = {
    stop() {
      stopping.abort();
      clearTimeout(timer);
      repeated.delete(control);
      tellFailing(control, null);
    },
    now() {
      if (!running && timer !== null) turn();
    },
  };
  async function turn() {
    clearTimeout(timer);
    [timer, running] = [null, true];
    let wait = null;
    try {
      wait = await task(stopping.signal);
      failures = 0;
      tellFailing(control, null);
    } catch (error) {
      if (stopping.signal.aborted) return;
      if (!(error instanceof Refused)) throw error;
      if (error.passes) {
        wait = Math.max(error.wait, Math.min(POLL * 2 ** failures++, LONGEST_WAIT));
        tellFailing(control, error.message);
      } else if (error.status !== 401) {
        tellFailing(control, null);
        refused(error);
      }
    } finally {
      running = false;
    }
    if (stopping.signal.aborted) return;
    if (wait === null) {
      repeated.delete(control);
      return;
    }
    timer = setTimeout(turn, document.hidden ? Math.max(wait, POLL_HIDDEN) : wait);
  }
  repeated.add(control);
  turn();
  return control;
}

function tellFailing(control, message) {
  if (message === null) {
    failing.delete(control);
  } else {
    failing.add(control);
    put($("away"), `${message} Trying again; nothing is lost.`);
  }
  $("away").hidden = failing.size === 0;
}

const nowAll = () => repeated.forEach((control) => control.now());
document.addEventListener("visibilitychange", () => document.hidden || nowAll());
addEventListener("online", nowAll);

// Only what differs: a message is not read out twice.
function put(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

// ---- Views

const VIEWS = {
  signin: "Sign in", new: "New request", jobs: "My requests", job: "Request",
  lost: "Not found",
};
let shown = null; // name of the view
let left = []; // what to stop when it is left
let parting = ""; // what is said in the next view

function show(name, focus = true) {
  left.forEach((control) => control.stop());
  left = [];
  for (const each of Object.keys(VIEWS)) $(`view-${each}`).hidden = each !== name;
  for (const link of $("menu").querySelectorAll("a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  title(VIEWS[name]);
  put($("said"), parting);
  put($("spoken"), "");
  parting = "";
  shown = name;
  scrollTo(0, 0);
  if (focus) $(`view-${name}`).querySelector("h1").focus();
}

const title = (text) => { document.title = `${text} · Neurotransmitter requests`; };

function route(focus = true) {
  if (!session) return signedOut("");
  const hash = location.hash.slice(1);
  const job = /^job=([0-9a-f]{16})$/.exec(hash);
  if (job) return openJob(job[1], focus);
  if (hash === "jobs") return openJobs(focus);
  return openRequest(focus);
}

// ---- Signing in and out

function signedOut(why = "You are signed out: the session has ended. Sign in again.") {
  session = null;
  $("menu").hidden = $("account").hidden = true;
  $("token").value = "";
  put($("signin-problem"), "");
  if (shown === "signin") return;
  parting = why;
  show("signin", false);
  $("token").focus();
}

function signedIn(answer, focus) {
  session = answer;
  put($("who"), visible(session.name));
  $("menu").hidden = $("account").hidden = false;
  $("token").value = "";
  route(focus);
}

async function signIn(token) {
  put($("signin-problem"), "");
  try {
    signedIn((await call("POST", "/api/session", JSON.stringify({ token }))).body, true);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    signedOut("");
    put($("signin-problem"), error.message);
  }
}

async function signOut() {
  try {
    await call("DELETE", "/api/session");
  } catch (error) {
    if (error.status !== 401 && error.status !== 403) {
      put($("said"), `Not signed out: ${error.message}`);
      return;
    }
  }
  clearRequest();
  history.replaceState(null, "", location.pathname);
  signedOut("You are signed out.");
}

function begin() {
  // The token is out of the address before anything is asked for.
  const token = /^#token=(.+)$/.exec(location.hash);
  if (token) {
    history.replaceState(null, "", location.pathname);
    signIn(token[1]);
    return;
  }
  const other = (error) => (error.status === 401 ? null : put($("said"), error.message));
  const first = repeat(async (signal) => {
    try {
      const answer = await get("/api/session", signal);
      signedIn(answer, false);
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 401) throw error;
      signedOut("");
    }
    return null;
  }, other);
  left.push(first);
}

// ---- A new request

let file = null; // what is too large to be shown, or is no text
let checked = null;
let checking = null, debounce = 0;
const asked = () => file || $("text").value;

function openRequest(focus) {
  show("new", focus);
  left.push(repeat(async (signal) => {
    fillModels(await get("/api/models", signal));
    const starting = models.some((model) => !model.ready && !model.problem);
    return starting ? POLL_LIST : null;
  }, (error) => put($("model-problem"), error.message)));
  left.push({ stop: () => { checking?.stop(); clearTimeout(debounce); } });
  if (file || $("text").value) changed(0);
  else showCheck(null);
}

function fillModels(found) {
  if (JSON.stringify(found) === JSON.stringify(models) && $("model").length) return;
  const before = $("model").value;
  models = found;
  $("model").replaceChildren(...models.map((model) =>
    make("option", { value: model.name }, visible(model.title) + (model.problem
      ? " (cannot be used)" : model.ready ? "" : " (starting)"))));
  const usable = models.find((m) => m.ready) || models.find((m) => !m.problem);
  const chosen = models.find((m) => m.name === before) || usable || models[0];
  if (chosen) $("model").value = chosen.name;
  fillSources();
}

const chosenModel = () => models.find((m) => m.name === $("model").value);
const chosenSource = () =>
  chosenModel()?.sources.find((s) => s.name === $("source").value);

function fillSources() {
  const model = chosenModel(), before = $("source").value;
  const sources = model ? model.sources : [];
  $("source").replaceChildren(...sources.map((source) =>
    make("option", { value: source.name }, visible(source.title))));
  if (sources.some((source) => source.name === before)) $("source").value = before;
  const problem = model ? model.problem : "There is no model here; add one to models.toml.";
  put($("model-problem"), problem ? visible(problem) : "");
  tellUnits();
}

function tellUnits() {
  const source = chosenSource();
  const neurons = source && (source.neurons
    ? `Neurons are given as ${source.neuron}s.`
    : "Neurons cannot be looked up here, only positions.");
  put($("units"), source ? `x, y and z are ${visible(source.units)}. ${neurons}` : "");
  changed(0);
}

function query() {
  const values = { model: $("model").value, source: $("source").value };
  if ($("kind").value) values.kind = $("kind").value;
  return new URLSearchParams(values);
}

function changed(wait = 600) {
  checking?.stop();
  clearTimeout(debounce);
  checked = null;
  $("start").disabled = true;
  put($("start-problem"), "");
  const empty = file ? file.size === 0 : !$("text").value.trim();
  if (shown !== "new" || empty || !$("source").value) {
    if (shown === "new") showCheck(null);
    return;
  }
  put($("verdict"), "Checking…");
  $("verdict").className = "";
  debounce = setTimeout(() => {
    const content = asked();
    checking = repeat(async (signal) => {
      if (new Blob([content]).size > MOST_BYTES) {
        throw new Refused(413, "This is more than 16 MiB; divide it into parts.", null, 0);
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

function showCheck(check) {
  checked = check;
  const errors = check ? check.error_count : 0;
  const warnings = check ? check.warning_count : 0;
  $("start").disabled = !check || errors > 0;
  $("verdict").className = !check ? "" : errors ? "bad" : "good";
  const also = warnings ? ` and ${count(warnings, "warning")}` : "";
  put($("verdict"), !check ? "Rows are checked as soon as there are any."
    : errors ? `${count(errors, "error")}${also}. Mend the text and it is checked again.`
      : warnings ? `No error${also}. It can start.` : "No error. It can start.");
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

const numberItem = ([number, what]) =>
  make("li", {}, make("b", {}, number), make("span", {}, what));

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
  const heads = ["line", "column", "what to do"].map((text) =>
    make("th", { scope: "col", class: "text" }, text));
  return scrollBox(name, make("table", {},
    make("caption", {}, `${name}: ${whole(total)}${few}`),
    make("thead", {}, make("tr", {}, ...heads)), body));
}

function scrollBox(label, table) {
  const attributes = { class: "scroll", tabindex: "0", role: "region", "aria-label": label };
  return make("div", attributes, table);
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

// A cell that a spreadsheet would take for a formula gets a ' before it.
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

async function take(given) {
  if (!given) return;
  let text = null;
  if (given.size <= MOST_SHOWN_BYTES) {
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await given.arrayBuffer());
    } catch {
      text = null; // the server says what is wrong with it
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

function clearRequest() {
  file = null;
  $("text").value = $("chosen").value = $("name").value = "";
  $("fresh").checked = false;
  $("text").hidden = false;
  $("file").hidden = true;
}

async function start(event) {
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
    if (status === 200) parting = "The same was asked before: this is that request.";
    location.hash = `job=${body.id}`;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.body && error.body.check) showCheck(error.body.check);
    else $("start").disabled = false;
    put($("start-problem"), error.message);
  }
}

// ---- One's own requests

const WAITING = new Set(["queued", "running"]);
const nameOf = (job) => visible(job.name || `Request ${job.id.slice(0, 6)}`);
const titleOf = (job) => {
  const model = models.find((m) => m.name === job.model);
  const source = model?.sources.find((s) => s.name === job.source);
  return [visible(model?.title || job.model), visible(source?.title || job.source)];
};

async function needModels(signal) {
  if (!models.length) fillModels(await get("/api/models", signal));
}

function openJobs(focus) {
  show("jobs", focus);
  left.push(repeat(async (signal) => {
    await needModels(signal);
    const { jobs } = await get("/api/jobs", signal);
    const { used, limits } = await get("/api/session", signal);
    put($("kept"), `Kept: ${size(used.bytes)} of ${size(limits.bytes)}. ` +
      `Unfinished: ${used.jobs} of at most ${limits.jobs}.`);
    $("no-jobs").hidden = jobs.length > 0;
    $("jobs-box").hidden = jobs.length === 0;
    fillJobs(jobs);
    return jobs.some((job) => WAITING.has(job.state)) ? POLL_LIST : null;
  }, (error) => put($("said"), error.message)));
}

function fillJobs(jobs) {
  const focused = document.activeElement?.dataset?.job;
  $("jobs").replaceChildren(...jobs.map((job) => {
    const link = make("a", { href: `#job=${job.id}`, "data-job": job.id }, nameOf(job));
    const state = make("span", { class: `state ${job.state}` }, job.state + part(job));
    const [model, source] = titleOf(job);
    const button = make("button", {
      type: "button", class: "plain", "data-job": `x${job.id}`,
      "aria-label": `delete ${nameOf(job)}`,
    }, "delete");
    button.addEventListener("click", () => remove(job, () => openJobs(true)));
    return make("tr", {},
      make("th", { scope: "row", class: "name" }, link),
      make("td", { class: "text" }, state),
      make("td", {}, whole(job.rows)),
      make("td", { class: "text name" }, model),
      make("td", { class: "text name" }, source),
      make("td", { class: "text" }, moment(job.created)),
      make("td", {}, job.state === "running" ? "" : button));
  }));
  if (focused) $("jobs").querySelector(`[data-job="${focused}"]`)?.focus();
}

function part(job) {
  if (job.state !== "running" || !job.total) return "";
  return `, ${Math.floor((100 * job.done) / job.total)} %`;
}

async function remove(job, after) {
  if (!confirm(`Delete “${nameOf(job)}” and what it answered?`)) return;
  try {
    await call("DELETE", `/api/jobs/${job.id}`);
    parting = "Deleted.";
    after();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    put($("said"), error.message);
  }
}

// ---- One request

let open = null; // the job that is shown
let paces = []; // {stage, at, done} of the last ten seconds
let spoken = { at: 0, state: "" };

function openJob(id, focus) {
  const again = open?.id === id;
  [open, paces, spoken] = [again ? open : null, [], { at: 0, state: "" }];
  if (!again) {
    for (const each of ["answer", "job-progress", "job-problem", "delete"]) $(each).hidden = true;
    for (const each of ["job-name", "job-facts", "job-state"]) put($(each), "");
  }
  show("job", focus);
  let answered = false;
  left.push(repeat(async (signal) => {
    await needModels(signal);
    open = await get(`/api/jobs/${id}`, signal);
    showJob(open);
    if (open.state === "done" && !answered) {
      answered = true;
      showAnswer(open);
    }
    return WAITING.has(open.state) ? POLL : null;
  }, (error) => (error.status === 404 ? show("lost") : put($("said"), error.message))));
}

function showJob(job) {
  const [model, source] = titleOf(job);
  const waiting = WAITING.has(job.state);
  put($("job-name"), nameOf(job));
  $("job-facts").replaceChildren(`${model} · ${source} · `,
    job.kind === "neurons" && waiting ? "neurons" : count(job.rows, "row"),
    " · asked ", moment(job.created));
  $("job-state").className = `state ${job.state}`;
  put($("job-state"), job.state === "queued" && job.ahead
    ? `queued, ${count(job.ahead, "request")} before it` : job.state);
  $("job-progress").hidden = !waiting;
  $("delete").hidden = job.state === "running";
  $("job-problem").hidden = !job.message || job.state === "done";
  put($("job-problem"), job.message ? visible(job.message) : "");
  $("answer").hidden = job.state !== "done";
  title(waiting && part(job) ? `${part(job).slice(2)} ${nameOf(job)}` : nameOf(job));
  if (waiting) showProgress(job);
  speak(job, waiting ? $("pace").textContent : job.message || "");
}

function showProgress(job) {
  const now = performance.now();
  paces = paces.filter((p) => p.stage === job.stage && p.done <= job.done);
  paces = paces.filter((p, i) => now - p.at < 10_000 || i === paces.length - 1);
  const [first] = paces;
  paces.push({ stage: job.stage, at: now, done: job.done });
  put($("stage"), job.state === "queued" ? "Waiting for its turn" : job.stage || "starting");
  if (job.total) {
    $("bar").max = job.total;
    $("bar").value = job.done;
  } else {
    $("bar").removeAttribute("value");
  }
  const parts = [];
  const share = part(job).replace(",", " ·");
  if (job.total) parts.push(`${whole(job.done)} of ${whole(job.total)}${share}`);
  if (first && job.done > first.done) {
    const rate = (1000 * (job.done - first.done)) / (now - first.at);
    parts.push(`${rate < 10 ? rate.toFixed(1) : whole(Math.round(rate))} a second`);
  }
  if (job.eta_seconds !== null) parts.push(`about ${duration(job.eta_seconds)} left`);
  put($("pace"), parts.join(" · "));
}

// Not every second, and each change of state.
function speak(job, more) {
  const now = performance.now();
  if (job.state === spoken.state && now - spoken.at < SPEAK_EVERY) return;
  if (job.state === spoken.state && !WAITING.has(job.state)) return;
  spoken = { at: now, state: job.state };
  put($("spoken"), [job.state, job.stage, more].filter(Boolean).join(", "));
}

async function cancel() {
  try {
    await call("POST", `/api/jobs/${open.id}/cancel`);
    nowAll();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    put($("said"), `Not cancelled: ${error.message}`);
  }
}

// The classes with their colours as the model has them.
function classesOf(job) {
  const known = models.find((m) => m.name === job.model)?.classes || [];
  return job.answer.classes.map((name, place) =>
    known.find((c) => c.name === name) || { name, short: name.slice(0, 4), colour: place % 10 });
}

function showAnswer(job) {
  const answer = job.answer, classes = classesOf(job);
  showLinks(job.links);
  $("statuses").replaceChildren(...[
    [whole(answer.rows), answer.rows === 1 ? "synapse" : "synapses"],
    ...Object.entries(answer.status).map(([name, n]) => [whole(n), name.replaceAll("_", " ")]),
  ].map(numberItem));
  $("remarks").replaceChildren(
    ...answer.warnings.map((text) => make("p", { class: "box warn" }, visible(text))),
    ...idList(answer.unknown_neurons, "unknown to the source"),
    ...idList(answer.neurons_without_synapses, "without synapses"));
  $("legend").replaceChildren(...classes.map((c) => make("li", {},
    make("i", { class: `c${c.colour}` }), `${visible(c.name)} (${visible(c.short)})`)));
  options($("status"), Object.keys(answer.status));
  options($("called"), [...answer.classes, "none"]);
  left.push(paged($("neurons"), `/api/jobs/${job.id}/neurons`, "neurons", "neuron",
    NEURON_HEADS, (neuron) => neuronRow(neuron, classes)));
  left.push(paged($("synapses"), `/api/jobs/${job.id}/synapses`, "rows", "synapse",
    SYNAPSE_HEADS, (row) => synapseRow(row, classes)));
}

function showLinks(links) {
  const items = [];
  const add = (text, url, attributes) => items.push(make("li", {},
    make("a", { class: "button", href: url, ...attributes }, text)));
  add("Report", links.report, { target: "_blank", rel: "noopener" });
  add("CSV", links.csv, { download: "" });
  add("Feather", links.feather, { download: "" });
  if (/^https?:\/\//.test(links.neuroglancer || "")) {
    add(`Neuroglancer (${new URL(links.neuroglancer).host})`, links.neuroglancer,
      { target: "_blank", rel: "noopener noreferrer" });
  }
  $("links").replaceChildren(...items);
}

function idList(ids, what) {
  if (!ids.length) return [];
  const list = make("ul", {}, ...ids.slice(0, 1000).map((id) => make("li", {}, id)));
  const first = ids.length > 1000 ? " (the first 1,000; the report has all)" : "";
  const details = make("details", {},
    make("summary", {}, `${count(ids.length, "neuron")} ${what}${first}`), list);
  details.open = ids.length <= 20;
  return [details];
}

function options(select, names) {
  select.replaceChildren(make("option", { value: "" }, "all"),
    ...names.map((name) => make("option", { value: name }, visible(name.replaceAll("_", " ")))));
}

// ---- Tables that the server searches and cuts into pages

const NEURON_HEADS = ["neuron", "called", "synapses called each class", "synapses", "predicted"];
const SYNAPSE_HEADS = [
  "synapse", "called", "probability", "of each class", "neuron", "status", "x nm", "y nm", "z nm",
];
const WORDS = new Set(["status", "called", "synapses called each class", "of each class"]);

function paged(section, path, key, what, heads, line) {
  section.querySelector(".scroll")?.remove();
  section.querySelector(".pages")?.remove();
  const form = section.querySelector("form");
  form.reset();
  const body = make("tbody"), output = make("output"), head = make("tr");
  head.append(...heads.map((text) =>
    make("th", { scope: "col", ...(WORDS.has(text) ? { class: "text" } : {}) }, text)));
  const back = make("button", { type: "button" }, "‹ Before");
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

function neuronRow(neuron, classes) {
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

function synapseRow(row, classes) {
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

// A bar divided by class; the numbers are its name for who cannot see it.
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

// ---- What a person does

function listen() {
  $("signin").addEventListener("submit", (event) => {
    event.preventDefault();
    signIn($("token").value.trim());
  });
  $("leave").addEventListener("click", signOut);
  $("request").addEventListener("submit", start);
  $("text").addEventListener("input", () => changed());
  $("kind").addEventListener("change", () => changed(0));
  $("model").addEventListener("change", fillSources);
  $("source").addEventListener("change", tellUnits);
  $("choose").addEventListener("click", () => $("chosen").click());
  $("chosen").addEventListener("change", () => take($("chosen").files[0]));
  for (const id of ["clear", "remove"]) {
    $(id).addEventListener("click", () => {
      clearRequest();
      changed(0);
      $("text").focus();
    });
  }
  const view = $("view-new"), over = (on) => $("drop").classList.toggle("over", on);
  view.addEventListener("dragover", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    over(true);
  });
  view.addEventListener("dragleave", (event) => {
    if (!view.contains(event.relatedTarget)) over(false);
  });
  view.addEventListener("drop", (event) => {
    over(false);
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  $("cancel").addEventListener("click", cancel);
  $("delete").addEventListener("click", () => remove(open, () => { location.hash = "jobs"; }));
  addEventListener("hashchange", () => {
    if (/^#token=/.test(location.hash)) begin();
    else if (location.hash !== "#main") route();
  });
}

listen();
begin();
