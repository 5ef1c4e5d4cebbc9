/** The page: wires the conversation, its list, the settings and the metrics to the elements of index.html. */

import { listModels } from "./api.js";
import { parseTools, Run } from "./chat.js";
import { make, makeButton } from "./dom.js";
import { makeMessageView } from "./messages.js";
import { MetricsView } from "./metrics.js";
import * as store from "./store.js";

const get = (id) => document.getElementById(id);
const [log, message, banner, announcer, dialog] = ["log", "message", "banner", "announcer", "settings"].map(get);
const form = get("settings-form");
const FULL = "The browser's storage is full: this conversation is kept only until the tab is closed. Export or delete some.";
const IDEAS = ["What is the capital of Norway?", "Write a Python function that reverses a text.", "Explain a prefix cache in two sentences."];
const NEAR_END = 80; // pixels from the end of the log that count as reading along

const settings = store.loadSettings();
let key = store.loadKey();
let conversation = store.makeConversation(settings.system);
let run = null;
let views = new Map();
const metrics = new MetricsView(get("metrics"), () => key);

// The conversation

function showConversation() {
  views = new Map();
  log.replaceChildren();
  if (!conversation.messages.length) log.append(makeEmpty());
  conversation.messages.forEach(appendView);
  document.title = conversation.title ? `${conversation.title} – mlcbuild` : "mlcbuild";
  get("export").disabled = !conversation.messages.length;
  showList();
  scrollToEnd();
}

/** What a conversation shows before it begins. An idea is put into the message field, not sent. */
function makeEmpty() {
  const take = (text) => {
    message.value = text;
    fitMessage();
    message.focus();
  };
  return make(
    "div",
    { class: "empty" },
    make("h2", {}, "Ask something"),
    make("p", {}, "What you write stays between this browser and the server."),
    make("div", { class: "ideas" }, IDEAS.map((text) => makeButton(text, () => take(text)))),
  );
}

function appendView(entry) {
  log.querySelector(":scope > .empty")?.remove();
  const view = makeMessageView(entry, {
    onEdit: (text) => cutAndAsk(entry, { role: "user", content: text }),
    onRegenerate: () => cutAndAsk(entry),
    onToolResults: (results) => ask(results.map((result) => ({ role: "tool", ...result }))),
    onKey: () => openSettings("key"),
  });
  views.set(entry, view);
  log.append(view.element);
}

/** Drop `entry` and all that follows, then ask again with `instead` in its place. */
function cutAndAsk(entry, ...instead) {
  if (run) return;
  conversation.messages.length = conversation.messages.indexOf(entry);
  ask(instead);
}

function ask(entries) {
  if (run) return;
  conversation.messages.push(...entries);
  store.saveConversation(conversation);
  const mine = conversation;
  run = new Run(mine, settings, key, {
    onChange: (text) => {
      if (mine === conversation) showChange(run.reply, text);
    },
    onSave: () => {
      if (!store.saveConversation(mine)) showBanner(FULL);
      else if (banner.textContent === FULL) showBanner("");
    },
  });
  showConversation();
  showRunning(true);
  announcer.replaceChildren();
  unspoken = "";
  focusMessage();
  run.done.then(() => {
    const { reply } = run;
    const follows = isAtEnd();
    run = null;
    showRunning(false); // shows what was hidden meanwhile, such as the fields for the results of tools
    if (mine === conversation) {
      draw(reply);
      if (follows) scrollToEnd();
      announce(reply.error ? "" : " End of the reply.", true);
    }
    showList();
  });
}

let frame = 0;
/** Draws at most once per frame, however fast pieces come. */
function showChange(reply, text) {
  announce(text);
  frame ||= requestAnimationFrame(() => draw(reply));
}

function draw(reply) {
  cancelAnimationFrame(frame);
  frame = 0;
  const follows = isAtEnd();
  views.get(reply)?.update();
  if (follows) scrollToEnd();
  else get("to-end").hidden = false;
}

let unspoken = "";
/** Screen readers get whole sentences, not tokens. */
function announce(text, end = false) {
  unspoken += text;
  const sentences = end ? unspoken : unspoken.match(/^[\s\S]*[.!?:\n](?=\s)/)?.[0];
  if (!sentences) return;
  unspoken = unspoken.slice(sentences.length);
  announcer.append(make("p", {}, sentences));
}

function showRunning(running) {
  const focused = [get("send"), get("stop")].includes(document.activeElement);
  document.body.classList.toggle("running", running);
  get("send").hidden = running;
  get("stop").hidden = !running;
  if (focused) focusMessage();
}

/** Not by itself where that opens a keyboard on the screen. */
function focusMessage() {
  if (!isTouch()) message.focus();
  else if (document.activeElement !== message) document.activeElement?.blur();
}

const isTouch = () => matchMedia("(pointer: coarse)").matches;

function isAtEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
}

function scrollToEnd() {
  log.scrollTop = log.scrollHeight;
  get("to-end").hidden = true;
}

// The list of conversations

function showList() {
  const items = store.listConversations().map(({ id, title }) => {
    const current = id === conversation.id;
    const open = makeButton(title, () => openConversation(id), { class: "open", "aria-current": current ? "true" : null });
    const remove = makeButton("✕", () => removeConversation(id, title), { class: "icon", "aria-label": `Delete ${title}` });
    return make("li", {}, open, remove);
  });
  get("conversations").replaceChildren(...items);
}

function openConversation(id) {
  conversation = run?.conversation.id === id ? run.conversation : (store.loadConversation(id) ?? store.makeConversation(settings.system));
  toggleSidebar(false);
  selectTab("chat");
  showConversation();
  focusMessage();
}

function removeConversation(id, title) {
  if (!confirm(`Delete “${title}”?`)) return;
  if (run?.conversation.id === id) {
    const ended = run;
    run.stop();
    ended.done.then(() => removeNow(id));
  } else removeNow(id);
}

function removeNow(id) {
  store.deleteConversation(id);
  if (conversation.id === id) openConversation("");
  else showList();
  get("new-chat").focus();
}

function exportConversation() {
  const { theme, system, ...asked } = settings; // the system prompt is the conversation's own
  const content = { ...conversation, exported: new Date().toISOString(), settings: asked };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  make("a", { href: url, download: `conversation-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// The settings

function openSettings(name) {
  for (const field of form.elements) {
    if (field.name) field.value = field.name === "key" ? key : field.name === "system" ? conversation.system : settings[field.name];
  }
  dialog.showModal();
  form.elements[typeof name === "string" ? name : "system"].focus();
}

/** Every change holds at once; there is nothing to cancel. */
function takeSetting({ target }) {
  if (target.name === "key") {
    key = target.value.trim();
    store.saveKey(key);
    return;
  }
  if (target.name === "system") conversation.system = target.value;
  settings[target.name] = target.value;
  if (target.name === "theme") showTheme();
  if (target.name === "tools") showToolsError(target);
  store.saveSettings(settings);
}

function showTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

function showToolsError(field) {
  let text = "";
  try {
    if (field.value.trim()) parseTools(field.value);
  } catch (error) {
    text = error.message;
  }
  get("tools-error").textContent = text;
  field.setAttribute("aria-invalid", String(Boolean(text)));
}

async function loadModels() {
  const select = get("model");
  try {
    const models = await listModels(key);
    const describe = ({ id, context_window: tokens }) => (tokens ? `${id} · ${tokens.toLocaleString("en")} tokens` : id);
    select.replaceChildren(...models.map((model) => make("option", { value: model.id }, describe(model))));
    if (models.some(({ id }) => id === settings.model)) select.value = settings.model;
    settings.model = select.value;
    showBanner("");
  } catch (error) {
    const button = error.status === 401 ? makeButton("Enter an API key", () => openSettings("key")) : makeButton("Try again", loadModels);
    showBanner(`${error.message} `, button);
  }
}

function showBanner(text, ...more) {
  banner.replaceChildren(text, ...more);
  banner.hidden = !text;
}

// The frame

function selectTab(name) {
  for (const other of ["chat", "metrics"]) {
    const tab = get(`tab-${other}`);
    tab.setAttribute("aria-selected", String(other === name));
    tab.tabIndex = other === name ? 0 : -1;
    get(other).hidden = other !== name;
  }
  if (name === "metrics") metrics.start();
  else metrics.stop();
}

function toggleSidebar(open) {
  document.body.classList.toggle("sidebar-open", open);
  get("open-sidebar").setAttribute("aria-expanded", String(open));
}

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function sendMessage() {
  const text = message.value.trim();
  if (!text || run) return;
  message.value = "";
  fitMessage();
  ask([{ role: "user", content: text }]);
}

get("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  sendMessage();
});
message.addEventListener("input", fitMessage);
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  if (isTouch() && !event.ctrlKey) return; // there, Enter is the only way to break a line
  event.preventDefault();
  sendMessage();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || dialog.open) return;
  if (document.body.classList.contains("sidebar-open")) {
    toggleSidebar(false);
    get("open-sidebar").focus();
  } else run?.stop();
});
get("stop").addEventListener("click", () => run?.stop());
get("new-chat").addEventListener("click", () => openConversation(""));
get("export").addEventListener("click", exportConversation);
get("to-end").addEventListener("click", scrollToEnd);
log.addEventListener("scroll", () => isAtEnd() && (get("to-end").hidden = true));
get("model").addEventListener("change", ({ target }) => {
  settings.model = target.value;
  store.saveSettings(settings);
});
get("open-settings").addEventListener("click", openSettings);
get("close-settings").addEventListener("click", () => dialog.close());
form.addEventListener("input", takeSetting);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  dialog.close();
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // the backdrop
dialog.addEventListener("close", () => {
  store.saveConversation(conversation);
  loadModels();
});
get("open-sidebar").addEventListener("click", () => {
  toggleSidebar(true);
  get("new-chat").focus();
});
get("close-sidebar").addEventListener("click", () => {
  toggleSidebar(false);
  get("open-sidebar").focus();
});
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => selectTab(tab.id.slice("tab-".length)));
  tab.addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = tab.id === "tab-chat" ? "metrics" : "chat";
    selectTab(other);
    get(`tab-${other}`).focus();
  });
}
window.addEventListener("storage", showList);
window.addEventListener("pagehide", () => {
  run?.stop();
  if (run) store.saveConversation(run.conversation);
});

loadModels();
showConversation();
fitMessage();
focusMessage();
