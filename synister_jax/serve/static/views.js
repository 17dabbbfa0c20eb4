// SPDX-License-Identifier: Apache-2.0
// The views of the page. The page shows one view at a time.

import { $, put } from "./elements.js";
import { state } from "./state.js";

const VIEWS = {
  signin: "Sign in", new: "New request", jobs: "My requests", job: "Request",
  lost: "Not found",
};

export function show(name, focus = true) {
  state.left.forEach((control) => control.stop());
  state.left = [];
  for (const each of Object.keys(VIEWS)) $(`view-${each}`).hidden = each !== name;
  for (const link of $("menu").querySelectorAll("a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  title(VIEWS[name]);
  put($("said"), state.parting);
  put($("spoken"), "");
  state.parting = "";
  state.shown = name;
  scrollTo(0, 0);
  if (focus) $(`view-${name}`).querySelector("h1").focus();
}

export const title = (text) => { document.title = `${text} · Neurotransmitter requests`; };
