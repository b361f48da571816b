/** Runs conversations: sending, streaming, stopping, editing, regenerating. */

import { streamAnswer } from "./api.js";
import {
  addRun,
  ask,
  beginAnswer,
  historyOf,
  lengthOf,
  newConversation,
  truncateFrom,
} from "./conversation.js";

const ALTERNATIVES = 5;

export class Chat {
  current = newConversation();
  #streams = new Map(); // conversation id -> {controller, done}

  /**
   * `view` is notified: opened(), added(message), run(answer, run), dropped(answer),
   * began(), ended(conversation, answer), and notKept() when the browser had no room.
   * `model()` resolves to the model to ask, with the server's limits.
   */
  constructor({ store, settings, view, model }) {
    Object.assign(this, { store, settings, view, model });
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

  /** Replaces a question, drops what came after it, and sends it. */
  async edit(message, text) {
    await this.#rewindTo(message);
    this.send(text);
  }

  /** Drops an answer and what came after it, and requests another. */
  async regenerate(answer) {
    await this.#rewindTo(answer);
    this.#write(this.current, beginAnswer(this.current, this.settings.get("explain")));
  }

  /** Stops the answer of the current conversation; what has arrived is kept. */
  stop() {
    this.#streams.get(this.current.id)?.controller.abort();
  }

  /** Saves what has arrived of all answers, for a page that is about to close. */
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
    const { id, limits } = await this.model();
    const { messages, dropped } = historyOf(conversation, limits);
    answer.maxTokens = this.settings.get("maxTokens");
    const body = { ...this.#samplingOf(answer), messages, model: id };
    let offset = 0; // characters of the answer so far
    let begin = null;
    for await (const chunk of streamAnswer(body, { apiKey: this.settings.apiKey, signal })) {
      this.#takeDropped(answer, dropped + (chunk.dropped_messages ?? 0));
      if (chunk.usage) answer.usage = usageOf(chunk.usage, begin);
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const piece = choice.delta?.part ?? { type: "text", text: choice.delta?.content ?? "" };
      const tokens = choice.logprobs?.content ?? [];
      const runs = answer.explained ? runsOf(piece, tokens, offset) : [piece];
      offset += lengthOf(piece.text);
      for (const run of runs.filter(({ text }) => text !== "")) {
        begin ??= performance.now();
        addRun(answer, run);
        this.view.run(answer, run);
      }
      answer.finish = choice.finish_reason ?? answer.finish;
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

function usageOf(usage, begin) {
  const seconds = begin === null ? 0 : (performance.now() - begin) / 1000;
  return { tokens: usage.completion_tokens, seconds };
}

/**
 * A piece of an answer as runs {type, text, token}: its text, divided where its tokens begin.
 * `entries` are the tokens as OpenAI's logprobs list them, `offset` is where the piece begins.
 */
function runsOf({ type, text }, entries, offset) {
  const characters = Array.from(text);
  const shown = entries.filter(({ bytes }) => bytes.length > 0); // a marker has no text
  const starts = [...new Set(shown.map((entry) => entry.text_offset - offset))];
  const runs = [{ type, text: characters.slice(0, starts[0]).join("") }]; // a tool's, for example
  starts.forEach((start, index) => {
    const own = shown.filter((entry) => entry.text_offset - offset === start);
    const part = characters.slice(start, starts[index + 1]).join("");
    runs.push({ type, text: part, token: joined(own) });
  });
  return runs;
}

/** Tokens that share a character, as one: probabilities multiply. */
function joined(entries) {
  const logprob = entries.reduce((sum, entry) => sum + entry.logprob, 0);
  const alternatives = (entries[0].top_logprobs ?? []).map((top) => [
    top.token,
    rounded(top.logprob),
  ]);
  return { logprob: rounded(logprob), alternatives };
}

function rounded(logprob) {
  return Math.round(logprob * 1e4) / 1e4;
}
