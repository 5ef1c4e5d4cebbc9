/** A reply as it grows: plain data, saved with its conversation. */

/** An empty reply. */
export function makeReply(model) {
  return { role: "assistant", content: "", reasoning: "", tool_calls: [], model };
}

/** Add one chunk of the stream to `reply`. Returns the text that it added to the answer. */
export function addChunk(reply, chunk) {
  if (chunk.usage) reply.usage = chunk.usage;
  if (chunk.timings) reply.timings = chunk.timings;
  const choice = chunk.choices?.[0];
  if (!choice) return "";
  if (choice.finish_reason) reply.finish_reason = choice.finish_reason;
  const delta = choice.delta ?? {};
  reply.content += delta.content ?? "";
  reply.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const part of delta.tool_calls ?? []) addToolCall(reply.tool_calls, part);
  return delta.content ?? "";
}

/** Tool calls come in pieces, told apart by their index; each piece of the arguments is appended. */
function addToolCall(calls, part) {
  const index = part.index ?? Math.max(0, calls.length - 1);
  let call = calls.find((known) => known.index === index);
  if (!call) {
    call = { index, id: "", type: "function", function: { name: "", arguments: "" } };
    calls.push(call);
  }
  if (part.id) call.id = part.id;
  call.function.name += part.function?.name ?? "";
  call.function.arguments += part.function?.arguments ?? "";
}

/** The messages of a conversation as the server wants them. Replies that failed empty-handed are left out. */
export function makeMessages(system, messages) {
  const wire = system.trim() ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    if (message.role !== "assistant") {
      const { role, content, tool_call_id } = message;
      wire.push(tool_call_id ? { role, content, tool_call_id } : { role, content });
    } else if (message.content || message.tool_calls?.length) {
      const said = { role: "assistant", content: message.content };
      if (message.reasoning) said.reasoning_content = message.reasoning; // templates know what is still of use
      if (message.tool_calls?.length) {
        said.tool_calls = message.tool_calls.map(({ id, type, function: called }) => ({ id, type, function: called }));
      }
      wire.push(said);
    }
  }
  return wire;
}

/** One line on how it went: tokens, speed, time to the first token. Numbers of the server, or those marked "here". */
export function describeReply(reply) {
  const words = [];
  const { usage, timings, measured, finish_reason: reason } = reply;
  if (usage) words.push(count(usage.completion_tokens, "token"));
  if (timings?.tokens_per_second) words.push(`${timings.tokens_per_second.toFixed(1)} tokens/s`);
  const first = timings?.ttft ?? measured?.first;
  if (typeof first === "number") words.push(`first token after ${formatSeconds(first)}${timings?.ttft ? "" : " (seen here)"}`);
  if (usage) words.push(`prompt ${count(usage.prompt_tokens, "token")}${cached(usage)}`);
  if (reply.stopped) words.push("stopped");
  else if (reason === "length") words.push("cut off at the token limit");
  else if (reason && !["stop", "tool_calls"].includes(reason)) words.push(reason);
  return words.join(" · ");
}

function cached(usage) {
  const tokens = usage.prompt_tokens_details?.cached_tokens;
  return tokens ? ` (${tokens} from the cache)` : "";
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function formatSeconds(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}
