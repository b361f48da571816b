/** The running of conversations: asking, streaming, stopping, editing, answering anew. */

import { Aligner, pieceOf } from "./alignment.js";
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
