/** Reads Prometheus' text format. */

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** [{name, type, help, samples: [{name, labels, value}]}], in the order of the text. */
export function parsePrometheus(text) {
  const families = new Map();
  const get = (name) => {
    if (!families.has(name)) families.set(name, { name, type: "untyped", help: "", samples: [] });
    return families.get(name);
  };
  for (const line of text.split("\n")) {
    const comment = /^# (HELP|TYPE) (\S+) ?(.*)$/.exec(line);
    if (comment) get(comment[2])[comment[1].toLowerCase()] = comment[3];
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!found) continue;
    const [, name, labels = "", value] = found;
    const family = families.get(name.replace(/_(bucket|sum|count)$/, "")) ?? get(name);
    family.samples.push({ name, labels: parseLabels(labels), value: parseNumber(value) });
  }
  return [...families.values()].filter((family) => family.samples.length);
}

function parseLabels(text) {
  const unescape = (value) => value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char));
  return Object.fromEntries([...text.matchAll(LABEL)].map(([, name, value]) => [name, unescape(value)]));
}

function parseNumber(text) {
  const special = { "+Inf": Infinity, Inf: Infinity, "-Inf": -Infinity };
  return special[text] ?? Number(text);
}

/** [{labels, count, mean, p50, p95, p99}] of a histogram, one for each set of labels. */
export function summarize(family) {
  const groups = new Map();
  for (const { name, labels, value } of family.samples) {
    const { le, ...rest } = labels;
    const key = JSON.stringify(rest);
    if (!groups.has(key)) groups.set(key, { labels: rest, buckets: [], sum: 0, count: 0 });
    const group = groups.get(key);
    if (name.endsWith("_bucket")) group.buckets.push([parseNumber(le), value]);
    else if (name.endsWith("_sum")) group.sum = value;
    else if (name.endsWith("_count")) group.count = value;
  }
  return [...groups.values()].map(({ labels, buckets, sum, count }) => {
    buckets.sort((a, b) => a[0] - b[0]);
    const [p50, p95, p99] = [0.5, 0.95, 0.99].map((part) => quantile(buckets, part));
    return { labels, count, mean: count ? sum / count : NaN, p50, p95, p99 };
  });
}

/** As Prometheus' histogram_quantile: linear within a bucket, the last finite bound beyond all. */
export function quantile(buckets, part) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return NaN;
  const rank = part * total;
  const index = buckets.findIndex(([, below]) => below >= rank);
  const [high, upTo] = buckets[index];
  const [low, before] = index ? buckets[index - 1] : [0, 0];
  return high === Infinity ? low : low + ((high - low) * (rank - before)) / (upTo - before || 1);
}
