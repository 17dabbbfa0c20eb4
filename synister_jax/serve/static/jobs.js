// SPDX-License-Identifier: Apache-2.0
// The list of the user's requests, and the view of one request.

import {
  $, count, duration, make, moment, numberItem, put, size, visible, whole,
} from "./elements.js";
import { fillModels } from "./request.js";
import { POLL, POLL_LIST, Refused, call, get, nowAll, repeat } from "./server.js";
import { state } from "./state.js";
import {
  NEURON_HEADS, SYNAPSE_HEADS, neuronRow, paged, synapseRow,
} from "./tables.js";
import { show, title } from "./views.js";

const SPEAK_EVERY = 15_000; // milliseconds between two reports for screen readers

const WAITING = new Set(["queued", "running"]);
const nameOf = (job) => visible(job.name || `Request ${job.id.slice(0, 6)}`);
const titleOf = (job) => {
  const model = state.models.find((m) => m.name === job.model);
  const source = model?.sources.find((s) => s.name === job.source);
  return [visible(model?.title || job.model), visible(source?.title || job.source)];
};

async function needModels(signal) {
  if (!state.models.length) fillModels(await get("/api/models", signal));
}

export function openJobs(focus) {
  show("jobs", focus);
  state.left.push(repeat(async (signal) => {
    await needModels(signal);
    const { jobs } = await get("/api/jobs", signal);
    const { used, limits } = await get("/api/session", signal);
    put($("kept"), `Your requests take ${size(used.bytes)} of ${size(limits.bytes)}. ` +
      `Unfinished requests: ${used.jobs} of at most ${limits.jobs}.`);
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
    const how = make("span", { class: `state ${job.state}` }, job.state + part(job));
    const [model, source] = titleOf(job);
    const button = make("button", {
      type: "button", class: "plain", "data-job": `x${job.id}`,
      "aria-label": `delete ${nameOf(job)}`,
    }, "delete");
    button.addEventListener("click", () => remove(job, () => openJobs(true)));
    return make("tr", {},
      make("th", { scope: "row", class: "name" }, link),
      make("td", { class: "text" }, how),
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
  if (!confirm(`Delete “${nameOf(job)}” and its answer?`)) return;
  try {
    await call("DELETE", `/api/jobs/${job.id}`);
    state.parting = "The request is deleted.";
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

export function openJob(id, focus) {
  const again = open?.id === id;
  [open, paces, spoken] = [again ? open : null, [], { at: 0, state: "" }];
  if (!again) {
    for (const each of ["answer", "job-progress", "job-problem", "delete"]) $(each).hidden = true;
    for (const each of ["job-name", "job-facts", "job-state"]) put($(each), "");
  }
  show("job", focus);
  let answered = false;
  state.left.push(repeat(async (signal) => {
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
    " · submitted ", moment(job.created));
  $("job-state").className = `state ${job.state}`;
  put($("job-state"), job.state === "queued" && job.ahead
    ? `queued behind ${count(job.ahead, "request")}` : job.state);
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
  put($("stage"), job.state === "queued" ? "waiting in the queue" : job.stage || "starting");
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
    parts.push(`${rate < 10 ? rate.toFixed(1) : whole(Math.round(rate))} per second`);
  }
  if (job.eta_seconds !== null) parts.push(`about ${duration(job.eta_seconds)} left`);
  put($("pace"), parts.join(" · "));
}

// Reports each change of state at once, and the progress only from time to time.
function speak(job, more) {
  const now = performance.now();
  if (job.state === spoken.state && now - spoken.at < SPEAK_EVERY) return;
  if (job.state === spoken.state && !WAITING.has(job.state)) return;
  spoken = { at: now, state: job.state };
  put($("spoken"), [job.state, job.stage, more].filter(Boolean).join(", "));
}

export const removeOpen = (after) => remove(open, after);

export async function cancel() {
  try {
    await call("POST", `/api/jobs/${open.id}/cancel`);
    nowAll();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    put($("said"), `The request is not cancelled: ${error.message}`);
  }
}

// The classes of the answer, with the colours of the model.
function classesOf(job) {
  const known = state.models.find((m) => m.name === job.model)?.classes || [];
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
  state.left.push(paged($("neurons"), `/api/jobs/${job.id}/neurons`, "neurons", "neuron",
    NEURON_HEADS, (neuron) => neuronRow(neuron, classes)));
  state.left.push(paged($("synapses"), `/api/jobs/${job.id}/synapses`, "rows", "synapse",
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
  const first = ids.length > 1000 ? " (only the first 1,000 are shown; the report shows all)" : "";
  const details = make("details", {},
    make("summary", {}, `${count(ids.length, "neuron")} ${what}${first}`), list);
  details.open = ids.length <= 20;
  return [details];
}

function options(select, names) {
  select.replaceChildren(make("option", { value: "" }, "all"),
    ...names.map((name) => make("option", { value: name }, visible(name.replaceAll("_", " ")))));
}
