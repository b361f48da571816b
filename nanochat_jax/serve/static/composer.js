/** The field where a message is written, and the buttons that send it or stop the answer. */

import { byId } from "./dom.js";
import { NUMBERS } from "./settings.js";
import { readItem, writeItem } from "./storage.js";
import { isSendKey } from "./transcript.js";

const DRAFT = "nanochat:draft";

export class Composer {
  #area = byId("message");
  #send = byId("send");
  #stop = byId("stop");

  /** `actions`: {send(text) -> whether the text was taken, stop()}. */
  constructor(actions) {
    this.actions = actions;
    this.text = readItem(DRAFT, "sessionStorage") ?? "";
    this.#area.addEventListener("input", () => this.#grow());
    this.#area.addEventListener("keydown", (event) => {
      if (!isSendKey(event)) return;
      event.preventDefault();
      this.#submit();
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#stop.addEventListener("click", () => actions.stop());
  }

  get text() {
    return this.#area.value;
  }

  set text(value) {
    this.#area.value = value;
    this.#grow();
  }

  set placeholder(value) {
    this.#area.placeholder = value;
  }

  focus() {
    this.#area.focus();
  }

  /** While an answer is being written, Stop takes the place of Send. */
  set isWriting(isWriting) {
    const hadFocus = [this.#send, this.#stop].includes(document.activeElement);
    this.#send.hidden = isWriting;
    this.#stop.hidden = !isWriting;
    if (hadFocus) (isWriting ? this.#stop : this.#area).focus();
  }

  #submit() {
    if (this.text.trim() === "" || !this.#stop.hidden) return;
    const text = this.text;
    this.text = "";
    if (!this.actions.send(text)) this.text = text;
  }

  /** The field is as high as its text: a hidden copy of it, in style.css, makes the room. */
  #grow() {
    this.#area.parentNode.dataset.text = this.text;
    this.#send.disabled = this.text.trim() === "";
    writeItem(DRAFT, this.text, "sessionStorage");
  }
}

// --- slash commands ------------------------------------------------------------------------------

const SETTING_OF = { "/temperature": "temperature", "/topk": "topK" };

function help(settings) {
  return [
    `/temperature X — how surprising answers may be, ${settings.rangeOf("temperature")}`,
    `/topk K — sample among the K most likely tokens, ${settings.rangeOf("topK")}; 0: all`,
    "/clear — begin a new conversation",
    "/help — this list",
  ];
}

/**
 * Carries out a command with {settings, startNew}.
 * Returns {done, lines}: whether it could, and the sentences that say so; null for ordinary text.
 */
export function runCommand(text, { settings, startNew }) {
  if (!text.startsWith("/")) return null;
  const [name, ...rest] = text.trim().split(/\s+/);
  const command = name.toLowerCase();
  if (command in SETTING_OF) return changeSetting(SETTING_OF[command], rest.join(" "), settings);
  if (command === "/clear") {
    startNew();
    return { done: true, lines: ["This is a new conversation; the others are in the list."] };
  }
  if (command === "/help") return { done: true, lines: help(settings) };
  const advice = "/help lists them. To send text that begins with a slash, put a space before it.";
  return { done: false, lines: [`There is no command ${name}. ${advice}`] };
}

function changeSetting(name, value, settings) {
  const label = NUMBERS[name].label;
  if (!value) return { done: true, lines: [`${label} is ${settings.get(name)}.`] };
  try {
    settings.set(name, value);
  } catch (error) {
    return { done: false, lines: [error.message] };
  }
  return { done: true, lines: [`${label} is now ${settings.get(name)}.`] };
}
