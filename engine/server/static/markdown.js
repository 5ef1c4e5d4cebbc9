/** Markdown to elements. Model text becomes text nodes and nothing else; HTML in it is shown as it was written. */

import { make, makeCopyButton } from "./dom.js";
import { colour } from "./highlight.js";
import { renderInline } from "./inline.js";

const MAX_DEPTH = 8; // quotes and lists within each other; what lies deeper is shown as it was written
const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const DIVIDER = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;

/** Show `text` in `element`. Blocks that did not change keep their elements, so a stream costs its last block only. */
export function renderMarkdown(element, text) {
  const blocks = splitBlocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"));
  const shown = element.renderedBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && shown[same] === keyOf(blocks[same])) same += 1;
  while (element.children.length > same) element.lastChild.remove();
  element.append(...blocks.slice(same).map((block) => renderBlock(block, 0)));
  element.renderedBlocks = blocks.map(keyOf);
}

const keyOf = (block) => `${block.kind}\n${block.lines.join("\n")}`;

/** Consecutive lines that belong together: [{kind, lines, ...}]. */
function splitBlocks(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = takeBlock(lines, at);
    blocks.push(block);
    at += block.length;
  }
  return blocks;
}

function takeBlock(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return takeFence(lines, at);
  if (HEADING.test(line)) return { kind: "heading", lines: [line], length: 1 };
  if (RULE.test(line)) return { kind: "rule", lines: [line], length: 1 };
  if (QUOTE.test(line)) return takeWhile("quote", lines, at, (next) => QUOTE.test(next) || isText(next));
  if (ITEM.test(line)) return takeList(lines, at);
  if (line.startsWith("    ")) return takeWhile("indented", lines, at, (next) => next.startsWith("    "));
  if (isTable(lines, at)) return takeWhile("table", lines, at, (next) => next.includes("|"));
  return takeWhile("paragraph", lines, at, (next, index) => isText(next) && !isTable(lines, index));
}

/** A line that can only go on with what came before. */
function isText(line) {
  const item = ITEM.exec(line);
  const interrupts = item && item[4] && (/\D/.test(item[2][0]) || /^1[.)]$/.test(item[2]));
  return line.trim() !== "" && ![FENCE, HEADING, RULE, QUOTE].some((kind) => kind.test(line)) && !interrupts;
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && DIVIDER.test(lines[at + 1]);
}

function takeWhile(kind, lines, at, belongs) {
  let end = at + 1;
  while (end < lines.length && belongs(lines[end], end)) end += 1;
  return { kind, lines: lines.slice(at, end), length: end - at };
}

function takeFence(lines, at) {
  const [, indent, mark, language] = FENCE.exec(lines[at]);
  const isEnd = (line) => /^ {0,3}(`+|~+)\s*$/.test(line) && line.trim()[0] === mark[0] && line.trim().length >= mark.length;
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const body = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent.length, line.search(/\S|$/))));
  return { kind: "fence", lines: [language, ...body], length: Math.min(end + 1, lines.length) - at };
}

/** A list goes on while lines are items, indented, or text right after text; blank lines may stand between. */
function takeList(lines, at) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const isSame = (line) => {
    const item = ITEM.exec(line);
    return item && !RULE.test(line) && item[1].length >= indent.length && /\d/.test(item[2]) === /\d/.test(mark);
  };
  const isInside = (line) => line.search(/\S/) >= indent.length + 2;
  let end = at + 1;
  while (end < lines.length) {
    let next = end;
    while (next < lines.length && !lines[next].trim()) next += 1;
    const blank = next > end;
    if (next === lines.length) break;
    if (!isSame(lines[next]) && !isInside(lines[next]) && (blank || !isText(lines[next]))) break;
    end = next + 1;
  }
  return { kind: "list", lines: lines.slice(at, end), length: end - at };
}

function renderBlock(block, depth) {
  const { kind, lines } = block;
  if (kind === "fence") return renderCode(lines.slice(1).join("\n"), lines[0].trim());
  if (kind === "indented") return renderCode(lines.map((line) => line.slice(4)).join("\n"), "");
  if (kind === "rule") return make("hr");
  if (kind === "table") return renderTable(lines);
  if (kind === "heading") {
    const [, marks, text = ""] = HEADING.exec(lines[0]);
    return make(`h${Math.min(6, marks.length + 2)}`, {}, ...renderInline(text)); // the page itself has h1 and h2
  }
  if (depth < MAX_DEPTH && kind === "quote") {
    const inner = splitBlocks(lines.map((line) => line.replace(QUOTE, "")));
    return make("blockquote", {}, ...inner.map((part) => renderBlock(part, depth + 1)));
  }
  if (depth < MAX_DEPTH && kind === "list") return renderList(lines, depth);
  return make("p", {}, ...renderInline(lines.map((line) => line.trimStart()).join("\n")));
}

function renderCode(text, language) {
  const name = language.split(/\s/)[0].slice(0, 30);
  const bar = make("div", { class: "code-bar" }, make("span", {}, name || "text"));
  bar.append(makeCopyButton(() => text, { "aria-label": "Copy this code" }));
  // A block that scrolls must be reachable by keyboard.
  const code = make("pre", { tabindex: "0", role: "region", "aria-label": `Code${name ? `, ${name}` : ""}` });
  code.append(make("code", {}, colour(text, name).map(([kind, piece]) => (kind ? make("span", { class: kind }, piece) : piece))));
  return make("div", { class: "code" }, bar, code);
}

function renderList(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const start = ordered ? Number.parseInt(mark, 10) : 1;
  const list = make(ordered ? "ol" : "ul", start === 1 ? {} : { start: String(start) });
  for (const item of splitItems(lines, indent.length)) list.append(renderItem(item, depth));
  return list;
}

/** Each item's lines, without its mark and its indent. */
function splitItems(lines, indent) {
  const items = [];
  let width = 0;
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length < indent + 2 && (items.length === 0 || found[1].length < width)) {
      width = found[1].length + found[2].length + Math.min(found[3]?.length ?? 1, 4);
      items.push([found[4] ?? ""]);
    } else {
      items.at(-1).push(line.slice(Math.min(width, line.search(/\S|$/))));
    }
  }
  return items;
}

function renderItem(lines, depth) {
  const task = /^\[([ xX])\] +(.*)$/.exec(lines[0]);
  const box = task && make("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": "task" });
  const blocks = splitBlocks(task ? [task[2], ...lines.slice(1)] : lines);
  const loose = lines.some((line, index) => !line.trim() && index < lines.length - 1);
  const parts = blocks.map((block) => {
    const element = renderBlock(block, depth + 1);
    return block.kind === "paragraph" && !loose ? [...element.childNodes] : element;
  });
  return make("li", task ? { class: "task" } : {}, box, ...parts.flat());
}

function renderTable([head, divider, ...rows]) {
  const sides = splitCells(divider).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const makeRow = (line, tag) => {
    const cells = splitCells(line);
    return make("tr", {}, ...sides.map((side, index) => make(tag, { class: side || null }, ...renderInline(cells[index] ?? ""))));
  };
  const body = make("tbody", {}, ...rows.map((row) => makeRow(row, "td")));
  const table = make("table", {}, make("thead", {}, makeRow(head, "th")), body);
  return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

function splitCells(line) {
  const inside = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inside.split(/(?<!\\)\|/).map((cell) => cell.replace(/\\\|/g, "|").trim());
}
