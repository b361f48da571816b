/**
 * Brings together the text of a stream and the tokens it was made of. Text may come later than its
 * tokens (half a character, what might begin a stop string), and the markers of tools are tokens
 * without a text.
 */

const encoder = new TextEncoder();

export class Aligner {
  #type = "text";
  #text = ""; // arrived, not yet given out
  #tokens = []; // likewise: {text, logprob, alternatives}
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #unfinished = []; // tokens that end inside a character

  /** Takes a choice of a chunk and returns the runs {type, text, token} that are now complete. */
  feed({ delta, logprobs }) {
    for (const entry of logprobs?.content ?? []) this.#take(entry);
    const { type, text } = pieceOf(delta);
    if (!text) return [];
    const earlier = type === this.#type ? [] : this.flush();
    this.#type = type;
    this.#text += text;
    // What a tool answers was not drawn from the model.
    return earlier.concat(type === "python_output" ? this.flush() : this.#match());
  }

  /** The rest, as text without probabilities. */
  flush() {
    const text = this.#text;
    this.#text = "";
    return text ? [{ type: this.#type, text }] : [];
  }

  #take(entry) {
    const bytes = entry.bytes ? Uint8Array.from(entry.bytes) : encoder.encode(entry.token);
    if (bytes.length === 0) return;
    const text = this.#decoder.decode(bytes, { stream: true });
    this.#unfinished.push(entry);
    if (text) this.#tokens.push(joined(text, this.#unfinished.splice(0)));
  }

  #match() {
    const runs = [];
    while (this.#tokens.length && this.#text) {
      const token = this.#tokens[0];
      const isLonger = token.text.length > this.#text.length;
      if (isLonger && token.text.startsWith(this.#text)) break; // its rest is yet to come
      this.#tokens.shift();
      const start = this.#text.indexOf(token.text);
      if (start < 0) continue; // a marker, which is never shown
      if (start > 0) runs.push({ type: this.#type, text: this.#text.slice(0, start) });
      runs.push({ type: this.#type, text: token.text, token });
      this.#text = this.#text.slice(start + token.text.length);
    }
    return runs;
  }
}

/** The part of a delta: {type, text}. */
export function pieceOf(delta) {
  return delta?.part ?? { type: "text", text: delta?.content ?? "" };
}

/** Tokens that share a character, as one: probabilities multiply. */
function joined(text, entries) {
  const logprob = entries.reduce((sum, entry) => sum + entry.logprob, 0);
  const alternatives = (entries[0].top_logprobs ?? []).map((top) => [
    top.token,
    rounded(top.logprob),
  ]);
  return { text, logprob: rounded(logprob), alternatives };
}

function rounded(logprob) {
  return Math.round(logprob * 1e4) / 1e4;
}
