/** What the browser remembers: a conversation under a key of its own, so that two tabs do not undo each other. */

const CHAT = "mlcbuild.chat.";
const SETTINGS = "mlcbuild.settings";
const KEY = "mlcbuild.key";
const DEFAULTS = { system: "", temperature: "", top_p: "", top_k: "", min_p: "", effort: "", max_tokens: "", seed: "", tools: "", theme: "", model: "" };

export function loadSettings() {
  const saved = read("localStorage", SETTINGS) ?? {};
  return Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, String(saved[name] ?? value)]));
}

/** Returns whether there was room. */
export const saveSettings = (settings) => write("localStorage", SETTINGS, settings);

/** The key is for this tab only, and gone with it. */
export const loadKey = () => read("sessionStorage", KEY) ?? "";
export const saveKey = (key) => write("sessionStorage", KEY, key);

export function makeConversation(system) {
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", updated: Date.now(), system, messages: [] };
}

/** All saved conversations, newest first: [{id, title, updated}]. */
export function listConversations() {
  return listKeys()
    .filter((key) => key.startsWith(CHAT))
    .map((key) => read("localStorage", key))
    .filter(isConversation)
    .sort((a, b) => b.updated - a.updated)
    .map(({ id, title, updated }) => ({ id, title, updated }));
}

export function loadConversation(id) {
  const found = read("localStorage", CHAT + id);
  if (!isConversation(found)) return null;
  for (const message of found.messages.filter((known) => known.busy)) {
    delete message.busy; // the page was left while the reply came
    message.stopped = true;
  }
  return found;
}

/** Returns whether there was room. A conversation without messages is not worth a place. */
export function saveConversation(conversation) {
  if (!conversation.messages.length) return true;
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  conversation.title = first.replace(/\s+/g, " ").trim().slice(0, 80) || "Untitled";
  return write("localStorage", CHAT + conversation.id, conversation);
}

export function deleteConversation(id) {
  try {
    localStorage.removeItem(CHAT + id);
  } catch {
    /* what cannot be stored cannot be left over */
  }
}

function isConversation(value) {
  return typeof value?.id === "string" && Array.isArray(value.messages);
}

// Browsers may refuse storage altogether: then everything works, and is gone with the tab.

function listKeys() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}

function read(area, key) {
  try {
    return JSON.parse(window[area].getItem(key));
  } catch {
    return null;
  }
}

function write(area, key, value) {
  try {
    window[area].setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
