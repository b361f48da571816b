/** The running of conversations: asking, streaming, stopping, editing, answering anew. */

import { streamAnswer } from "./api.js";
import {
  addRun,
  ask,
  beginAnswer,
  historyOf,
  newConversation,
  truncateFrom,
} from "./conversation.js";

const ALTERNATIVES = 5;

export class Chat {
  current = newConversation();
  #streams = new Map(); // conversation id -> {controller, done}

  /**
   * `view` is told what happens: opened(), added(message), run(answer, run), dropped(answer),
   * began(), ended(conversation, answer), and notKept() when the browser had no room.
   * `modelName()` resolves to the id of the model to ask.
   */
  constructor({ store, settings, view, modelName }) {
    Object.assign(this, { store, settings, view, modelName });
  }

  get isWriting() {
    return this.#streams.has(this.current.id);
  }

  /** The ids of the conversations that are being answered. */
  get writing() {
    return new Set(this.#streams.keys());
  }

  startNew() {
    this.current = newConversation();
    this.view.opened();
  }

  open(id) {
    this.current = this.store.get(id) ?? newConversation();
    this.view.opened();
  }

  /** Deletes a conversation and returns it. */
  remove(id) {
    const conversation = this.store.get(id);
    this.#streams.get(id)?.controller.abort();
    this.#streams.delete(id);
    this.store.remove(id);
    if (id === this.current.id) this.startNew();
    return conversation;
  }

  restore(conversation) {
    this.save(conversation);
    this.open(conversation.id);
  }

  send(text) {
    const answer = ask(this.current, text, this.settings.get("explain"));
    this.view.added(this.current.messages.at(-2));
    this.#write(this.current, answer);
  }

  /** Replaces a question, forgets what came after it, and asks again. */
  async edit(message, text) {
    await this.#rewindTo(message);
    this.send(text);
  }

  /** Forgets an answer and what came after it, and asks for another. */
  async regenerate(answer) {
    await this.#rewindTo(answer);
    this.#write(this.current, beginAnswer(this.current, this.settings.get("explain")));
  }

  /** Ends the answer that is being written here; what has come is kept. */
  stop() {
    this.#streams.get(this.current.id)?.controller.abort();
  }

  /** Keeps what has come so far of all answers, for a page that is about to go. */
  saveAll() {
    for (const { conversation } of this.#streams.values()) this.store.save(conversation);
  }

  save(conversation) {
    if (!this.store.save(conversation)) this.view.notKept();
  }

  async #rewindTo(message) {
    const conversation = this.current;
    this.stop();
    await this.#streams.get(conversation.id)?.done;
    truncateFrom(conversation, message);
    this.view.opened();
  }

  #write(conversation, answer) {
    const controller = new AbortController();
    const done = this.#stream(conversation, answer, controller);
    this.#streams.set(conversation.id, { conversation, controller, done });
    this.view.added(answer);
    this.save(conversation);
    this.view.began();
  }

  async #stream(conversation, answer, controller) {
    answer.maxTokens = this.settings.get("maxTokens");
    try {
      await this.#receive(conversation, answer, controller.signal);
    } catch (error) {
      const isStopped = error.name === "AbortError";
      answer.finish = isStopped ? "stopped" : "error";
      if (!isStopped) Object.assign(answer, { problem: error.message, needsKey: error.needsKey });
    }
    conversation.changed = Date.now();
    // One that was deleted meanwhile must not come back.
    if (this.#streams.get(conversation.id)?.controller !== controller) return;
    this.#streams.delete(conversation.id);
    this.save(conversation);
    this.view.ended(conversation, answer);
  }

  async #receive(conversation, answer, signal) {
    const { messages, dropped } = historyOf(conversation);
    const body = { ...this.#samplingOf(answer), messages, model: await this.modelName() };
    const aligner = answer.explained ? new Aligner() : null;
    const add = (run) => {
      addRun(answer, run);
      this.view.run(answer, run);
    };
    let begin = null;
    try {
      for await (const chunk of streamAnswer(body, { apiKey: this.settings.apiKey, signal })) {
        this.#takeDropped(answer, dropped + (chunk.dropped_messages ?? 0));
        if (chunk.usage) answer.usage = usageOf(chunk.usage, begin);
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        runsOf(choice, aligner).forEach(add);
        if (answer.parts.length) begin ??= performance.now();
        answer.finish = choice.finish_reason ?? answer.finish;
      }
    } finally {
      aligner?.flush().forEach(add);
    }
    answer.finish ??= "stop";
  }

  #takeDropped(answer, count) {
    if (!(count > 0) || answer.dropped) return;
    answer.dropped = count;
    this.view.dropped(answer);
  }

  #samplingOf({ explained, maxTokens }) {
    const { settings } = this;
    return {
      temperature: settings.get("temperature"),
      top_k: settings.get("topK"),
      max_tokens: maxTokens,
      ...(explained ? { logprobs: true, top_logprobs: ALTERNATIVES } : {}),
    };
  }
}

function runsOf(choice, aligner) {
  if (aligner) return aligner.feed(choice);
  const piece = pieceOf(choice.delta);
  return piece.text ? [piece] : [];
}

function usageOf(usage, begin) {
  const seconds = begin === null ? 0 : (performance.now() - begin) / 1000;
  return { tokens: usage.completion_tokens, seconds };
}

// --- the text of a stream and its tokens ---------------------------------------------------------

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
