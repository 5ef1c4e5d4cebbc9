/** The metrics tab: /metrics every two seconds while it is looked at. */

import { fetchMetrics } from "./api.js";
import { make } from "./dom.js";
import { parsePrometheus, summarize } from "./prometheus.js";

const EVERY = 2000; // milliseconds
const KEPT = 60; // values of a curve
const OFF = "This server keeps its metrics to itself: /metrics is off.";
const SVG = "http://www.w3.org/2000/svg";

export class MetricsView {
  #element;
  #getKey;
  #timer = 0;
  #seen = new Map(); // series -> values, the newest last
  #before = null; // {time, values} of the last reading
  #tables = new Map(); // title -> element, which keeps its place and focus while its rows are replaced
  #reading = false;

  constructor(element, getKey) {
    this.#element = element;
    this.#getKey = getKey;
  }

  start() {
    this.stop();
    this.#read();
    this.#timer = setInterval(() => document.hidden || this.#read(), EVERY);
  }

  stop() {
    clearInterval(this.#timer);
  }

  async #read() {
    if (this.#reading) return; // a slow server is not asked twice
    this.#reading = true;
    try {
      const text = await fetchMetrics(this.#getKey());
      if (text === null) return this.#say(OFF);
      this.#show(parsePrometheus(text));
    } catch (error) {
      this.#say(`${error.status ? `Error ${error.status}: ` : ""}${error.message}`);
    } finally {
      this.#reading = false;
    }
  }

  #say(text) {
    if (this.#element.innerText === text) return;
    this.#tables.clear();
    this.#element.replaceChildren(make("p", { class: "empty", role: "status" }, text));
  }

  #show(families) {
    const time = performance.now() / 1000;
    const values = new Map();
    const rows = { gauge: [], counter: [], histogram: [] };
    for (const family of families) {
      if (family.type === "histogram") rows.histogram.push(...summarize(family).map((all) => makeSummaryRow(family, all)));
      else {
        for (const sample of family.samples) {
          if (family.name === "mlcbuild_build_info") continue; // not a number
          const series = `${sample.name}${JSON.stringify(sample.labels)}`;
          values.set(series, sample.value);
          const isCounter = family.type === "counter";
          const rate = isCounter ? this.#getRate(series, sample.value, time) : null;
          const curve = makeCurve(this.#keep(series, isCounter ? rate : sample.value));
          rows[isCounter ? "counter" : "gauge"].push(makeValueRow(family, sample, rate, curve));
        }
      }
    }
    this.#showTiles(families, values, time);
    this.#before = { time, values };
    this.#showTable("Now", ["", "Value", `Last ${(KEPT * EVERY) / 60000} minutes`], rows.gauge);
    this.#showTable("Since the start", ["", "Total", "Per second", "Rate"], rows.counter);
    this.#showTable("Distributions", ["", "Count", "Mean", "p50", "p95", "p99"], rows.histogram);
  }

  /** What one wants to know at a glance, of all models together. */
  #showTiles(families, values, time) {
    const find = (name) => families.find((family) => family.name === `mlcbuild_${name}`);
    const sum = (name) => find(name)?.samples.reduce((all, { value }) => all + value, 0);
    const rate = (name) => {
      const now = sum(name);
      values.set(`sum ${name}`, now);
      return now === undefined ? undefined : (this.#getRate(`sum ${name}`, now, time) ?? 0);
    };
    const spread = (name) => {
      const [found] = find(name) ? summarize(find(name)) : [];
      return found?.count ? [found.p50, `p95 ${format(found.p95, "_seconds")}`] : [undefined, ""];
    };
    const [first, firstMore] = spread("time_to_first_token_seconds");
    const [between, betweenMore] = spread("inter_token_latency_seconds");
    const queries = sum("prefix_cache_queries_total");
    const waiting = sum("requests_waiting");
    const tiles = [
      ["Written", rate("generation_tokens_total"), "", "tokens/s"],
      ["Read", rate("prompt_tokens_total"), "", "tokens/s"],
      ["Running", sum("requests_running"), "", waiting === undefined ? "" : `${waiting} waiting`],
      ["Answered", sum("requests_total"), "", `${sum("requests_rejected_total") ?? 0} refused`],
      ["KV cache in use", sum("kv_cache_usage_ratio"), "_ratio", "of its pages"],
      ["Prefix cache", queries ? sum("prefix_cache_hits_total") / queries : undefined, "_ratio", "of prompt tokens"],
      ["First token, p50", first, "_seconds", firstMore],
      ["Between tokens, p50", between, "_seconds", betweenMore],
    ];
    if (!this.#tables.size) {
      this.#element.replaceChildren(make("ul", { class: "tiles", "aria-label": "At a glance" }), make("p", { class: "build hint" }));
    }
    const builds = (find("build_info")?.samples ?? []).map(({ labels }) => `${labels.artifact}, served by mlcbuild ${labels.version}`);
    this.#element.querySelector(".build").textContent = builds.join("; ");
    const shown = tiles.filter(([, value]) => value !== undefined);
    this.#element.querySelector(".tiles").replaceChildren(...shown.map(([name, value, unit, more]) => {
      const curve = makeCurve(this.#keep(`tile ${name}`, value));
      curve.setAttribute("preserveAspectRatio", "none");
      const parts = [["name", name], ["value", format(value, unit)], ["more", more]];
      return make("li", { class: "tile" }, parts.map(([kind, text]) => make("span", { class: kind }, text)), curve);
    }));
  }

  #showTable(title, heads, rows) {
    if (!this.#tables.has(title)) {
      this.#tables.set(title, makeTable(title, heads));
      this.#element.append(this.#tables.get(title));
    }
    const table = this.#tables.get(title);
    table.hidden = !rows.length;
    table.querySelector("tbody").replaceChildren(...rows);
  }

  #getRate(series, value, time) {
    const last = this.#before?.values.get(series);
    return last === undefined || value < last ? null : (value - last) / (time - this.#before.time);
  }

  #keep(series, value) {
    const values = [...(this.#seen.get(series) ?? []), ...(value === null ? [] : [value])].slice(-KEPT);
    this.#seen.set(series, values);
    return values;
  }
}

function makeTable(title, heads) {
  const head = make("tr", {}, heads.map((text) => make("th", { scope: "col" }, text || make("span", { class: "hidden-text" }, "Metric"))));
  const table = make("table", {}, make("caption", {}, title), make("thead", {}, head), make("tbody"));
  return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": title }, table);
}

function makeName(family, labels) {
  const name = family.name.replace(/^mlcbuild_/, "").replace(/_(total|seconds|ratio)$/, "").replaceAll("_", " ");
  const parts = [`${name} `, make("small", {}, makeLabels(labels))];
  return make("th", { scope: "row", title: `${family.name}: ${family.help}` }, parts);
}

/** Without the model's name, which the head of the page shows. */
function makeLabels({ model_name: _, ...labels }) {
  return Object.entries(labels).map(([name, value]) => `${name}=${value}`).join(" ");
}

function makeValueRow(family, sample, rate, curve) {
  const cells = [make("td", {}, format(sample.value, family.name))];
  if (family.type === "counter") cells.push(make("td", {}, rate === null ? "–" : format(rate, "")));
  return make("tr", {}, makeName(family, sample.labels), ...cells, make("td", {}, curve));
}

function makeSummaryRow(family, { labels, count, mean, p50, p95, p99 }) {
  const cells = [format(count, ""), ...[mean, p50, p95, p99].map((value) => format(value, family.name))];
  return make("tr", {}, makeName(family, labels), cells.map((text) => make("td", {}, text)));
}

function format(value, name) {
  if (!Number.isFinite(value)) return "–";
  if (name.endsWith("_seconds")) return value < 1 ? `${(value * 1000).toPrecision(3)} ms` : `${value.toPrecision(3)} s`;
  if (name.endsWith("_ratio")) return `${(value * 100).toFixed(1)} %`;
  if (name.endsWith("_bytes")) return `${(value / 2 ** 20).toFixed(1)} MiB`;
  return value.toLocaleString("en", { maximumFractionDigits: 2 });
}

function makeCurve(values) {
  const svg = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "polyline");
  const low = Math.min(0, ...values);
  const span = Math.max(...values, low + 1e-9) - low;
  const points = values.map((value, index) => `${(index + KEPT - values.length) * 2},${22 - ((value - low) / span) * 20}`);
  line.setAttribute("points", points.join(" "));
  svg.setAttribute("viewBox", `0 0 ${KEPT * 2} 24`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(line);
  return svg;
}
