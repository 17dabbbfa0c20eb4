// SPDX-License-Identifier: Apache-2.0
// The main module of the page. It signs users in and out, chooses the view, and reacts
// to the actions of users.

import { $, put, visible } from "./elements.js";
import { cancel, openJob, openJobs, removeOpen } from "./jobs.js";
import {
  changed, clearRequest, fillSources, openRequest, start, take, tellUnits,
} from "./request.js";
import { Refused, call, get, repeat, whenSessionEnds } from "./server.js";
import { state } from "./state.js";
import { show } from "./views.js";

function route(focus = true) {
  if (!state.session) return signedOut("");
  const hash = location.hash.slice(1);
  const job = /^job=([0-9a-f]{16})$/.exec(hash);
  if (job) return openJob(job[1], focus);
  if (hash === "jobs") return openJobs(focus);
  return openRequest(focus);
}

// ---- Signing in and out

function signedOut(why = "You are signed out: the session has ended. Sign in again.") {
  state.session = null;
  $("menu").hidden = $("account").hidden = true;
  $("token").value = "";
  put($("signin-problem"), "");
  if (state.shown === "signin") return;
  state.parting = why;
  show("signin", false);
  $("token").focus();
}

function signedIn(answer, focus) {
  state.session = answer;
  put($("who"), visible(state.session.name));
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
      put($("said"), `You are still signed in: ${error.message}`);
      return;
    }
  }
  clearRequest();
  history.replaceState(null, "", location.pathname);
  signedOut("You are signed out.");
}

function begin() {
  // The token is removed from the address before the page sends any request.
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
  state.left.push(first);
}

// ---- Actions of users

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
  $("delete").addEventListener("click", () => removeOpen(() => { location.hash = "jobs"; }));
  addEventListener("hashchange", () => {
    if (/^#token=/.test(location.hash)) begin();
    else if (location.hash !== "#main") route();
  });
}

whenSessionEnds(signedOut);
listen();
begin();
