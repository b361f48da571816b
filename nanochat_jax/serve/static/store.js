/** The conversations of this browser, each under its own key, so that tabs do not conflict. */

import { readConversation } from "./conversation.js";
import { itemKeys, readJSON, removeItem, writeItem } from "./storage.js";

const PREFIX = "nanochat:conversation:";

export class ConversationStore {
  #conversations = new Map();

  constructor() {
    for (const key of itemKeys(PREFIX)) this.refresh(key);
  }

  /** Newest first. */
  list() {
    return [...this.#conversations.values()].sort((a, b) => b.changed - a.changed);
  }

  get(id) {
    return this.#conversations.get(id);
  }

  /** Whether the browser kept it; when its storage is full, old probabilities make room. */
  save(conversation) {
    this.#conversations.set(conversation.id, conversation);
    if (write(conversation)) return true;
    const others = this.list().filter((other) => other !== conversation);
    for (const other of [...others.reverse(), conversation]) {
      if (dropTokens(other) && other !== conversation) write(other);
      if (write(conversation)) return true;
    }
    return false;
  }

  remove(id) {
    this.#conversations.delete(id);
    removeItem(PREFIX + id);
  }

  /** Takes over what another tab wrote under `key`; its conversation's id, or null. */
  refresh(key) {
    if (!key?.startsWith(PREFIX)) return null;
    const id = key.slice(PREFIX.length);
    const conversation = readConversation(readJSON(key));
    if (conversation?.id === id) this.#conversations.set(id, conversation);
    else this.#conversations.delete(id);
    return id;
  }
}

function write(conversation) {
  return writeItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

/** Forgets the probabilities of finished answers, which take most of the room. */
function dropTokens(conversation) {
  const answers = conversation.messages.filter((message) => message.explained && message.finish);
  for (const answer of answers) {
    answer.explained = false;
    for (const part of answer.parts) delete part.tokens;
  }
  return answers.length > 0;
}
