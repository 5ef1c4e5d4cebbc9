/** One reply at a time: asks, adds what comes to the conversation, and says when there is something to show. */

import { ServerError, streamChat } from "./api.js";
import { addChunk, makeMessages, makeReply } from "./reply.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const SAVE_EVERY = 2000; // milliseconds

/** The body of the request; what the person left empty is left out, so that the model's own defaults hold. */
export function makeBody(conversation, settings) {
  const body = { model: settings.model, messages: makeMessages(conversation.system, conversation.messages) };
  for (const name of NUMBERS) if (settings[name] !== "") body[name] = Number(settings[name]);
  if (settings.effort) body.reasoning_effort = settings.effort;
  if (settings.tools.trim()) body.tools = parseTools(settings.tools);
  return body;
}

/** Throws a ServerError that says what is wrong with the text. */
export function parseTools(text) {
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new ServerError(`The tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new ServerError("The tools must be a JSON array.");
  return tools;
}

export class Run {
  #controller = new AbortController();

  /** `onChange(text)` after every piece, with what it added; `onSave()` now and then and at the end. */
  constructor(conversation, settings, key, { onChange, onSave }) {
    this.conversation = conversation;
    this.reply = { ...makeReply(settings.model), busy: true };
    conversation.messages.push(this.reply);
    this.done = this.#start(settings, key, onChange, onSave);
  }

  stop() {
    this.reply.stopped = true;
    this.#controller.abort();
  }

  async #start(settings, key, onChange, onSave) {
    const { reply, conversation } = this;
    const started = performance.now();
    let saved = started;
    await null; // whoever made this must have it before the first onChange
    try {
      const body = makeBody({ ...conversation, messages: conversation.messages.slice(0, -1) }, settings);
      for await (const chunk of streamChat(body, key, this.#controller.signal)) {
        const before = size(reply);
        const text = addChunk(reply, chunk);
        if (size(reply) > before) reply.measured ??= { first: (performance.now() - started) / 1000 };
        onChange(text);
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now();
          onSave();
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        const { message, status = 0, retryAfter = null } = error;
        reply.error = { message, status, retryAfter };
      }
    }
    delete reply.busy;
    conversation.updated = Date.now();
    onSave();
    onChange("");
  }
}

function size(reply) {
  return reply.content.length + reply.reasoning.length + reply.tool_calls.length;
}
