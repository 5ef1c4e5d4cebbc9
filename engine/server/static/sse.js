/** Server-sent events from a stream of bytes, wherever the network cuts them. */

/** Takes bytes, gives the data of each event that they complete. Line ends may be \n, \r\n or \r. */
export class EventParser {
  #decoder = new TextDecoder(); // keeps half a character until the rest comes; drops a byte order mark
  #line = "";
  #data = [];
  #afterReturn = false;

  push(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text && this.#afterReturn) {
      if (text[0] === "\n") text = text.slice(1); // the second half of a \r\n that was cut in two
      this.#afterReturn = false;
    }
    this.#afterReturn ||= text.endsWith("\r");
    const lines = text.split(/\r\n|\r|\n/);
    const events = [];
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop();
    for (const line of lines) this.#takeLine(line, events);
    return events;
  }

  #takeLine(line, events) {
    if (line === "") {
      if (this.#data.length) events.push(this.#data.join("\n"));
      this.#data = [];
    } else if (line === "data" || line.startsWith("data:")) {
      this.#data.push(line.slice(5).replace(/^ /, ""));
    } // comments, which keep connections alive, and other fields say nothing here
  }
}

/** The data of each event of a response's body. Leaving the loop early closes the connection. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
