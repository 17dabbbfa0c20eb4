// SPDX-License-Identifier: Apache-2.0
// Helpers that make elements of the page and write text into them. Data of the server
// is only ever inserted as text, never as HTML.

export const $ = (id) => document.getElementById(id);
export const whole = (x) => x.toLocaleString("en");
export const count = (x, one, many = `${one}s`) => `${whole(x)} ${x === 1 ? one : many}`;
// Shows characters that have no width or change the direction of text. With such a
// character, a name could look like another name.
export const visible = (text) => String(text).replace(
  /[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/g,
  (found) => `‹U+${found.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`,
);

export function make(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function duration(seconds) {
  if (seconds < 1.5) return "a second";
  if (seconds < 90) return `${Math.round(seconds)} seconds`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} minutes`;
  if (seconds < 172_800) return `${(seconds / 3600).toFixed(1)} hours`;
  return `${Math.round(seconds / 86_400)} days`;
}

export function moment(text) {
  const options = { dateStyle: "medium", timeStyle: "short" };
  const shown = new Date(text).toLocaleString("en-GB", options);
  return make("time", { datetime: text }, shown);
}

export function size(bytes) {
  if (bytes < 1e6) return `${whole(Math.ceil(bytes / 1e3))} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

// Writes a text only if it differs. Otherwise a screen reader would read it out again.
export function put(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

export const numberItem = ([number, what]) =>
  make("li", {}, make("b", {}, number), make("span", {}, what));

export function scrollBox(label, table) {
  const attributes = { class: "scroll", tabindex: "0", role: "region", "aria-label": label };
  return make("div", attributes, table);
}
