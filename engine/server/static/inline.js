/** The inside of a markdown paragraph: emphasis, code, links, line breaks. Every search is linear in the text. */

import { make } from "./dom.js";

const MAX_DEPTH = 12;
const MAX_LINK = 2000; // characters
const SAFE_LINK = /^(?:https?:\/\/|mailto:)[^\s<>"]+$/i; // nothing that runs, nothing of this server's own
const BARE_LINK = /^https?:\/\/[^\s<>"`]+/i;
const PUNCTUATION = /[!-/:-@[-`{-~]/;

/** Nodes for `text`. */
export function renderInline(text, depth = 0) {
  const nodes = [];
  const missing = new Set(); // marks that have no partner in the rest: not to be searched for again
  const links = { middle: -1 }; // where the last "](" that was searched for is
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  for (let at = 0; at < text.length; ) {
    const found = depth < MAX_DEPTH ? takeSpan(text, at, depth, missing, links) : null;
    if (found) {
      flush();
      nodes.push(found.node);
      at = found.end;
    } else if (text[at] === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else {
      const run = text[at] === "`" || text[at] === "*" || text[at] === "_" ? runLength(text, at) : 1;
      plain += text.slice(at, at + run);
      at += run;
    }
  }
  flush();
  return nodes;
}

/** The element that starts at `at` and where it ends, or null. */
function takeSpan(text, at, depth, missing, links) {
  const char = text[at];
  if (char === "\n") return { node: make("br"), end: at + 1 }; // models break a line where they mean it;
  if (char === "`") return takeCode(text, at, missing);
  if (char === "*" || char === "_" || char === "~") return takeEmphasis(text, at, depth, missing);
  if (char === "[" || (char === "!" && text[at + 1] === "[")) return takeLink(text, at, depth, links);
  if (char === "<") return takeAngleLink(text, at);
  if (char === "h" || char === "H") return takeBareLink(text, at);
  return null;
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function takeCode(text, at, missing) {
  const length = runLength(text, at);
  const name = `code ${length}`;
  if (missing.has(name)) return null;
  for (let end = text.indexOf("`", at + length); end >= 0; end = text.indexOf("`", end)) {
    const run = runLength(text, end);
    if (run === length) {
      const inside = text.slice(at + length, end).replace(/\n/g, " ");
      const trimmed = /^ .*[^ ].* $/.test(inside) ? inside.slice(1, -1) : inside;
      return { node: make("code", {}, trimmed), end: end + run };
    }
    end += run;
  }
  missing.add(name);
  return null;
}

function takeEmphasis(text, at, depth, missing) {
  const mark = text[at];
  const run = runLength(text, at);
  const length = mark === "~" ? (run === 2 ? 2 : 0) : Math.min(run, 2);
  const name = mark.repeat(length);
  if (!length || missing.has(name) || /\s/.test(text[at + run] ?? " ")) return null;
  if (mark === "_" && /[\p{L}\p{N}_]/u.test(text[at - 1] ?? "")) return null;
  const end = findCloser(text, at + run, mark, length);
  if (end < 0) {
    missing.add(name);
    return null;
  }
  const tag = mark === "~" ? "del" : length === 2 ? "strong" : "em";
  return { node: make(tag, {}, ...renderInline(text.slice(at + length, end), depth + 1)), end: end + length };
}

/** Where the run of marks begins that closes emphasis of `length` marks, or -1. Code spans are stepped over. */
function findCloser(text, from, mark, length) {
  for (let at = from; at < text.length; ) {
    if (text[at] === "\\") at += 2;
    else if (text[at] === "`") {
      const run = runLength(text, at);
      const end = text.indexOf("`".repeat(run), at + run);
      at = end < 0 ? at + run : end + run;
    } else if (text[at] !== mark) at += 1;
    else {
      const run = runLength(text, at);
      const closes = !/\s/.test(text[at - 1]) && (length === 2 ? run >= 2 : run % 2 === 1);
      const wordGoesOn = mark === "_" && /[\p{L}\p{N}]/u.test(text[at + run] ?? "");
      if (closes && !wordGoesOn) return at + run - length;
      at += run;
    }
  }
  return -1;
}

/** [text](address). An image is shown as a link: this page loads nothing that a model names. */
function takeLink(text, at, depth, links) {
  const open = text[at] === "!" ? at + 1 : at;
  if (links.middle < open) {
    const next = text.indexOf("](", open);
    links.middle = next < 0 ? Infinity : next;
  }
  if (links.middle === Infinity) return null;
  const inside = text.slice(open + 1, links.middle);
  const target = text.slice(links.middle + 2, links.middle + 2 + MAX_LINK);
  const rest = /^<?([^\s<>]*?)>?(?:\s+"[^"\n]*")?\)/.exec(target);
  if (!rest || inside.includes("[") || !SAFE_LINK.test(rest[1])) return null;
  const children = inside ? renderInline(inside, depth + 1) : [rest[1]];
  return { node: makeLink(rest[1], children), end: links.middle + 2 + rest[0].length };
}

function takeAngleLink(text, at) {
  const found = /^<([^\s<>]+)>/.exec(text.slice(at, at + MAX_LINK));
  return found && SAFE_LINK.test(found[1]) ? { node: makeLink(found[1], [found[1]]), end: at + found[0].length } : null;
}

function takeBareLink(text, at) {
  if (/[\p{L}\p{N}]/u.test(text[at - 1] ?? "")) return null;
  const found = BARE_LINK.exec(text.slice(at, at + MAX_LINK));
  if (!found) return null;
  let address = found[0].replace(/[.,;:!?'"*_~\]]+$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  return { node: makeLink(address, [address]), end: at + address.length };
}

function makeLink(address, children) {
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
