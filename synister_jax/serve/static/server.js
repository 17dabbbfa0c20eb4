// SPDX-License-Identifier: Apache-2.0
// Sends requests to the server and repeats them. The page shows a message while the
// server does not answer.

import { $, put } from "./elements.js";
import { state } from "./state.js";

export const POLL = 1000, POLL_LIST = 2000; // milliseconds
const POLL_HIDDEN = 10_000;
const LONGEST_WAIT = 30_000;

export class Refused extends Error {
  constructor(status, message, body, seconds) {
    super(message);
    this.status = status;
    this.body = body;
    this.wait = 1000 * seconds; // milliseconds that the server asks the page to wait
    this.passes = status === 0 || status === 429 || status >= 500; // try again
  }
}

let sessionEnded = () => {};
export const whenSessionEnds = (action) => { sessionEnded = action; };

function detailOf(body, status) {
  const detail = body && body.detail;
  if (typeof detail === "string") return detail;
  if (Array.isArray(detail)) return detail.map((one) => one.msg).join("; ");
  return `The server answered ${status}.`;
}

export async function call(method, path, content, signal) {
  const headers = { Accept: "application/json" };
  if (method !== "GET" && state.session) headers["X-CSRF-Token"] = state.session.csrf;
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
  if (response.status === 401 && path !== "/api/session") sessionEnded();
  const seconds = Number(response.headers.get("Retry-After")) || 0;
  throw new Refused(response.status, detailOf(body, response.status), body, seconds);
}

export const get = async (path, signal) => (await call("GET", path, undefined, signal)).body;

const failing = new Set(); // tasks that wait for the server to come back
const repeated = new Set();

// Calls a task again after the milliseconds that the task returns, until the task returns
// null. After an error that may pass, the next call comes later each time, and the page
// shows the error.
export function repeat(task, refused) {
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
    put($("away"), `${message} The page tries again; nothing is lost.`);
  }
  $("away").hidden = failing.size === 0;
}

export const nowAll = () => repeated.forEach((control) => control.now());
document.addEventListener("visibilitychange", () => document.hidden || nowAll());
addEventListener("online", nowAll);
