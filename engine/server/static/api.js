/** Talks to the server that this page came from. What goes wrong is a ServerError with the server's own words. */

import { readEvents } from "./sse.js";

export class ServerError extends Error {
  /** `status` is HTTP's, 0 when there was no answer; `code` and `param` are OpenAI's, or null. */
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

const UNREACHABLE = "The server cannot be reached. Is it still running?";
const CUT = "The connection ended before the reply did.";

/** The models that the server has: [{id, context_window, variant, ...}]. */
export async function listModels(key) {
  const response = await request("v1/models", key);
  return (await response.json()).data;
}

/** Prometheus text, or null when the server has no such route. */
export async function fetchMetrics(key) {
  try {
    return await (await request("metrics", key)).text();
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

/** The chunks of a streamed reply. `signal` ends it with an AbortError. */
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, timings: true, stream_options: { include_usage: true } }),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    throw new ServerError("The answer is not a stream of events: something stands between this page and the server.");
  }
  const events = readEvents(response.body);
  for (;;) {
    const { value: data, done } = await events.next().catch((error) => {
      throw error.name === "AbortError" ? error : new ServerError(CUT);
    });
    if (done) throw new ServerError(CUT);
    if (data === "[DONE]") return void events.return();
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, { status: response.status, ...chunk.error });
    yield chunk;
  }
}

async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(UNREACHABLE);
  }
  if (!response.ok) throw await makeError(response);
  return response;
}

/** What the server says is wrong: OpenAI's body, or whatever else came. */
async function makeError(response) {
  const text = await response.text().catch(() => "");
  const rest = { status: response.status, retryAfter: response.headers.get("retry-after") };
  try {
    const { message, code = null, param = null } = JSON.parse(text).error;
    return new ServerError(message, { ...rest, code, param });
  } catch {
    return new ServerError(text.slice(0, 500) || response.statusText || "The server gave no reason.", rest);
  }
}
