// SPDX-License-Identifier: Apache-2.0
// Makes the tables of neurons interactive: sort, filter, show votes, download as CSV.
"use strict";

const PAGE = 100; // how many rows are added at once

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const whole = (x) => (x === null ? "–" : x.toLocaleString("en"));
const decimal = (x) => (x === null ? "–" : x.toFixed(3));
// With characters that have no width or reverse the text, a name could look like another.
const visible = (text) => text.replace(
  /[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/g,
  (found) => `‹U+${found.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`,
);
const percent = (x) => (100 * x).toFixed(1) + " %";

class Neurons {
  constructor(section) {
    this.section = section;
    this.data = JSON.parse(section.querySelector("script").textContent);
    const { columns, words } = this.data;
    this.size = columns.id.length;
    const spelled = (name) => columns[name].map((i) => (i < 0 ? null : words[name][i]));
    this.values = { ...columns };
    for (const name of Object.keys(words)) this.values[name] = spelled(name);
    this.values.id = columns.id.map(BigInt); // ids have 18 digits, and numbers are exact up to 15
    this.searched = columns.id.map((id, row) =>
      [id, ...Object.keys(words).map((name) => this.values[name][row] || "")]
        .join("\n")
        .toLowerCase(),
    );
    this.sort = { by: "predicted", descending: true };
    this.body = section.querySelector("tbody");
    this.headers = [...section.querySelectorAll("thead th")];
    for (const header of this.headers) this.makeSortable(header);
    this.listen();
    this.update();
  }

  find(selector) {
    return this.section.querySelector(selector);
  }

  makeSortable(header) {
    const by = header.dataset.by;
    if (!by) return;
    const button = element("button", { type: "button" }, header.textContent.trim());
    button.addEventListener("click", () => {
      const same = this.sort.by === by;
      const isText = by === "id" || by in this.data.words;
      this.sort = { by, descending: same ? !this.sort.descending : !isText };
      this.update();
    });
    header.replaceChildren(button);
  }

  listen() {
    const controls = this.find(".controls");
    controls.hidden = false;
    controls.addEventListener("input", () => this.update());
    this.find(".csv").addEventListener("click", () => this.download());
    const more = this.find(".more button");
    more.addEventListener("click", () => this.grow());
    new IntersectionObserver((seen) => seen.some((x) => x.isIntersecting) && this.grow(), {
      root: this.find(".scroll"),
      rootMargin: "400px", // load rows before the reader reaches the end
    }).observe(this.find(".end"));
  }

  verdict(row) {
    const known = this.values.known[row];
    const called = this.values.called[row];
    if (called === null || !this.data.classes.includes(called)) return "";
    if (!this.data.classes.includes(known)) return "";
    return known === called ? "right" : "wrong";
  }

  update() {
    const text = this.find(".filter").value.trim().toLowerCase();
    const wanted = this.find(".class").value;
    const least = Number(this.find(".least").value) || 0;
    const differs = this.find(".differs").checked;
    const unclear = this.find(".unclear").checked;
    const { called, predicted } = this.values;
    this.rows = [];
    for (let row = 0; row < this.size; row++) {
      if (text && !this.searched[row].includes(text)) continue;
      if (wanted && (called[row] === null ? "-" : visible(called[row])) !== wanted) continue;
      if (predicted[row] < least) continue;
      // If both boxes are checked, a row is kept if one of the conditions holds.
      const asked = (differs && this.verdict(row) === "wrong") ||
        (unclear && called[row] === "unclear");
      if ((differs || unclear) && !asked) continue;
      this.rows.push(row);
    }
    this.order();
    for (const header of this.headers) {
      header.removeAttribute("aria-sort");
      if (header.dataset.by === this.sort.by) {
        const way = this.sort.descending ? "descending" : "ascending";
        header.setAttribute("aria-sort", way);
      }
    }
    this.find("output").textContent =
      `${whole(this.rows.length)} of ${whole(this.size)} neurons`;
    this.body.replaceChildren();
    this.shown = 0;
    this.find(".scroll").scrollTop = 0;
    this.grow();
  }

  order() {
    const values = this.values[this.sort.by];
    const way = this.sort.descending ? -1 : 1;
    const isText = this.sort.by in this.data.words;
    this.rows.sort((a, b) => {
      const x = values[a], y = values[b];
      if (x === y) return a - b;
      if (x === null) return 1; // unknown values come last in both orders
      if (y === null) return -1;
      return way * (isText ? x.localeCompare(y, "en") : x < y ? -1 : 1);
    });
  }

  grow() {
    const end = Math.min(this.shown + PAGE, this.rows.length);
    for (; this.shown < end; this.shown++) this.body.append(this.line(this.rows[this.shown]));
    const left = this.rows.length - this.shown;
    this.find(".more button").hidden = left === 0;
    this.find(".more span").textContent = left ? `${whole(this.shown)} rows shown.` : "";
  }

  line(row) {
    const values = this.values;
    const cells = {
      id: () => {
        const id = this.data.columns.id[row];
        const open = element("button", {
          type: "button", class: "open", "aria-expanded": "false",
          "aria-label": `votes of neuron ${id}`,
        });
        open.addEventListener("click", () => this.toggle(open, row));
        return element("td", {}, open, id);
      },
      called: () => this.callCell(row),
      votes: () => element("td", {}, this.stack(row)),
    };
    const line = element("tr");
    for (const { dataset } of this.headers) {
      const name = dataset.by || "votes";
      const cell = cells[name];
      const text = dataset.as === "decimal" ? decimal : dataset.as === "whole" ? whole : null;
      if (cell) line.append(cell());
      else if (text) line.append(element("td", {}, text(values[name][row])));
      else line.append(element("td", { class: "text name" }, visible(values[name][row] ?? "–")));
    }
    return line;
  }

  callCell(row) {
    const called = visible(this.values.called[row] ?? "not predicted");
    const tie = this.values.tie[row] ? " (tie)" : "";
    const verdict = this.verdict(row);
    const mark = { right: "\u00a0✓", wrong: "\u00a0✗", "": "" }[verdict];
    const cell = element("td", { class: `text name ${verdict}` }, called + tie + mark);
    if (verdict) cell.title = verdict === "right" ? "agrees with the known class" : "differs from the known class";
    return cell;
  }

  stack(row) {
    const { classes, colours, short } = this.data;
    const counts = this.data.counts[row];
    const total = this.values.predicted[row];
    const said = classes.map((name, k) => `${visible(name)} ${whole(counts[k])}`);
    const bar = element("div", { class: "stack", role: "img", "aria-label": said.join(", "),
      title: said.filter((_, k) => counts[k]).join(", ") });
    counts.forEach((count, k) => {
      if (!count) return;
      const share = count / total;
      const text = share >= 0.24 ? visible(short[k]) : "";
      const part = element("i", { class: `c${colours[k]}` }, text);
      part.style.width = `${100 * share}%`;
      bar.append(part);
    });
    return bar;
  }

  toggle(button, row) {
    const line = button.closest("tr");
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) line.nextElementSibling.remove();
    else {
      const cell = element("td", { colspan: this.headers.length }, this.detail(row));
      line.after(element("tr", { class: "detail" }, cell));
    }
  }

  detail(row) {
    const { classes, colours, rule } = this.data;
    const counts = this.data.counts[row];
    const predicted = this.values.predicted[row];
    const most = Math.max(...counts, 1);
    const chart = element("div", { class: "votes" });
    classes.forEach((name, k) => {
      const fill = element("i", { class: `c${colours[k]}` });
      fill.style.width = `${(100 * counts[k]) / most}%`;
      const share = predicted ? ` (${percent(counts[k] / predicted)})` : "";
      chart.append(element("span", { class: "name" }, visible(name)), element("span", { class: "bar" }, fill),
        element("span", {}, whole(counts[k]) + share));
    });
    const figure = element("figure", {},
      element("figcaption", {},
        `Synapses of neuron ${this.data.columns.id[row]} by called class`),
      chart);
    const { score, margin, entropy } = this.values;
    const facts = `Rule ${rule}: score ${decimal(score[row])}, margin ` +
      `${decimal(margin[row])}, entropy ${decimal(entropy[row])} bits.`;
    const doubts = [];
    if (predicted < 100) doubts.push("fewer than 100 predicted synapses");
    if (2 * Math.max(...counts) <= predicted) {
      doubts.push("no class has more than half of the predicted synapses");
    }
    if (this.values.tie[row]) doubts.push("several classes have the same highest value");
    const doubt = doubts.length ? ` Uncertain: ${doubts.join(", ")}.` : "";
    const note = element("p", { class: "note" }, facts + doubt);
    return element("div", { class: "pinned" }, figure, note);
  }

  csv() {
    const { columns, words, classes, counts, rule } = this.data;
    const text = ["known", "called", "hemilineage", "cell_type"].filter((n) => n in words);
    const numbers = ["score", "margin", "tie", "entropy", "synapses", "predicted"];
    // A spreadsheet would run a name that begins with one of these as a formula.
    const safe = (value) => {
      const name = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
      return /[",\n\r]/.test(name) ? `"${name.replaceAll('"', '""')}"` : name;
    };
    const head = ["neuron_id", ...text, "rule", ...numbers,
      ...classes.map((name) => `count_${name}`)];
    const lines = this.rows.map((row) => [
      columns.id[row],
      ...text.map((name) => safe(this.values[name][row] ?? "")),
      safe(rule),
      ...numbers.map((name) => columns[name][row] ?? ""),
      ...counts[row],
    ]);
    return [head, ...lines].map((cells) => cells.join(",") + "\r\n").join("");
  }

  download() {
    const url = URL.createObjectURL(new Blob([this.csv()], { type: "text/csv" }));
    element("a", { href: url, download: "neurons.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}

const tables = [...document.querySelectorAll(".neurons")].map((x) => new Neurons(x));
