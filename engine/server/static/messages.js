/** What one message looks like, and what can be done to it. */

import { make, makeButton, makeCopyButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { describeReply } from "./reply.js";

/**
 * The element of a message and `update()`, to be called when the message has changed.
 * `actions`: onEdit(text), onRegenerate(), onToolResults([{tool_call_id, content}]), onKey().
 */
export function makeMessageView(message, actions) {
  return message.role === "assistant" ? makeReplyView(message, actions) : makeOwnView(message, actions);
}

function makeFrame(message, title) {
  const heading = make("h2", { class: "who" }, title);
  return make("article", { class: `message ${message.role}`, "aria-label": title }, heading);
}

/** What the person, or a tool on their behalf, said: shown as it was typed. */
function makeOwnView(message, actions) {
  const element = makeFrame(message, message.role === "tool" ? "Tool result" : "You");
  const text = make("div", { class: "own" }, message.content);
  const bar = make("div", { class: "actions" }, makeCopyButton(() => message.content, { "aria-label": "Copy this message" }));
  if (message.role === "user") {
    const edit = makeButton("Edit", () => text.replaceWith(makeEditor(message, actions, { text, bar, edit })), {
      class: "edit",
      "aria-label": "Edit this message",
    });
    bar.append(edit);
  }
  element.append(text, bar);
  return { element, update() {} };
}

/** A form in place of the message's text. It takes the focus once it is in the page. */
function makeEditor(message, actions, { text, bar, edit }) {
  const area = make("textarea", { rows: "3", "aria-label": "Your message" });
  area.value = message.content;
  const cancel = () => {
    form.replaceWith(text);
    bar.hidden = false;
    edit.focus();
  };
  const send = (event) => {
    event.preventDefault();
    if (area.value.trim()) actions.onEdit(area.value);
  };
  const form = make(
    "form",
    { class: "editor", onsubmit: send },
    area,
    make("p", { class: "hint" }, "What follows this message is replaced."),
    make("button", { type: "submit", class: "primary" }, "Send again"),
    makeButton("Cancel", cancel),
  );
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") cancel();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event);
    else return;
    event.stopPropagation();
  });
  bar.hidden = true;
  queueMicrotask(() => {
    area.style.height = `min(50vh, ${area.scrollHeight + 2}px)`;
    area.focus();
  });
  return form;
}

function makeReplyView(message, actions) {
  const element = makeFrame(message, message.model || "Assistant");
  const reasoning = makeReasoning();
  const content = make("div", { class: "markdown" });
  const calls = make("div", { class: "calls" });
  const waiting = make("p", { class: "waiting", hidden: true }, "Waiting for the first token");
  const error = make("div", { class: "error", role: "alert", hidden: true });
  const stats = make("p", { class: "stats" });
  const regenerate = makeButton("Regenerate", actions.onRegenerate, { class: "regenerate", "aria-label": "Regenerate this reply" });
  const copy = makeCopyButton(() => message.content, { "aria-label": "Copy this reply" });
  const bar = make("div", { class: "actions" }, copy, regenerate, stats);
  element.append(reasoning.element, content, calls, waiting, error, bar);
  const update = () => {
    const busy = Boolean(message.busy);
    element.setAttribute("aria-busy", String(busy));
    reasoning.update(message.reasoning, busy && !message.content);
    renderMarkdown(content, message.content);
    updateCalls(calls, message.tool_calls ?? []);
    waiting.hidden = !busy || Boolean(message.content || message.reasoning || message.tool_calls?.length);
    if (message.error && error.hidden) error.append(...describeError(message.error, actions));
    error.hidden = !message.error;
    stats.textContent = busy ? "" : describeReply(message);
    bar.hidden = busy;
    copy.hidden = !message.content;
    if (!busy && message.tool_calls?.length && !calls.answered) addResultForm(calls, message.tool_calls, actions);
  };
  update();
  return { element, update };
}

/** Open while the model thinks, closed once it speaks; a person's own choice is kept. */
function makeReasoning() {
  const text = make("div", { class: "reasoning-text" });
  const summary = make("summary", {}, "Reasoning");
  const element = make("details", { class: "reasoning", hidden: true }, summary, text);
  let chosen = false;
  summary.addEventListener("click", () => (chosen = true));
  const update = (reasoning, thinking) => {
    element.hidden = !reasoning;
    if (text.textContent !== reasoning) text.textContent = reasoning ?? "";
    summary.textContent = thinking ? "Reasoning …" : "Reasoning";
    if (!chosen) element.open = thinking;
  };
  return { element, update };
}

function updateCalls(element, calls) {
  calls.forEach((call, index) => {
    let card = element.querySelectorAll(":scope > .call")[index];
    if (!card) {
      card = make("section", { class: "call" }, make("h3"), make("pre", { tabindex: "0", "aria-label": "Arguments" }));
      element.append(card);
    }
    card.querySelector("h3").textContent = `Calls ${call.function.name || "…"}`;
    card.querySelector("pre").textContent = indent(call.function.arguments);
    card.setAttribute("aria-label", `Call of ${call.function.name}`);
  });
}

/** Arguments that are whole are laid out; pieces of them, and what is no JSON, are shown as they came. */
function indent(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** This page runs no tools: the person says what each call gave. Hidden by the style sheet once more messages follow. */
function addResultForm(element, calls, actions) {
  element.answered = true;
  const areas = calls.map(() => make("textarea", { rows: "2", class: "mono" }));
  const send = (event) => {
    event.preventDefault();
    actions.onToolResults(calls.map((call, index) => ({ tool_call_id: call.id, content: areas[index].value })));
  };
  const isOnly = ({ function: { name } }) => calls.filter((call) => call.function.name === name).length === 1;
  const describe = (call) => `Result of ${call.function.name}${isOnly(call) ? "" : ` ${call.function.arguments.slice(0, 80)}`}`;
  const fields = calls.map((call, index) => make("label", {}, describe(call), areas[index]));
  const button = make("button", { type: "submit", class: "primary" }, calls.length === 1 ? "Send the result" : "Send the results");
  element.append(make("form", { class: "results", onsubmit: send }, fields, button));
}

function describeError(error, actions) {
  const parts = [make("strong", {}, error.status ? `Error ${error.status}:` : "Error:"), ` ${error.message}`];
  if (error.retryAfter) parts.push(` (try again in ${error.retryAfter} s)`);
  if (error.status === 401 || error.status === 403) parts.push(" ", makeButton("Enter an API key", actions.onKey));
  return parts;
}
