/** The conversation on the page: questions, answers, and what can be done with them. */

import { AnswerBody, legend } from "./answer.js";
import { answerText, runsOf } from "./conversation.js";
import { element, iconButton, showToast, textButton } from "./dom.js";

export class Transcript {
  #root;
  #actions;
  #answers = new Map(); // answer -> {node, body, foot}

  /** `actions`: {edit(message, text), regenerate(answer), enterKey()}. */
  constructor(root, actions) {
    this.#root = root;
    this.#actions = actions;
  }

  /** Shows a whole conversation; with `explain`, answers that have probabilities show them. */
  show(conversation, explain) {
    this.#answers.clear();
    this.#root.replaceChildren();
    for (const message of conversation.messages) this.add(message, explain);
  }

  add(message, explain) {
    if (message.role === "user") this.#root.append(this.#question(message));
    else this.#addAnswer(message, explain);
  }

  /** Shows an element that is no part of the conversation. */
  addNote(lines) {
    const paragraphs = lines.map((line) => element("p", {}, line));
    this.#root.append(element("div", { className: "note" }, ...paragraphs));
  }

  /** Appends a run to an answer, if it is shown. */
  append(answer, run) {
    this.#answers.get(answer)?.body.append(run);
  }

  /** Shows how an answer ended, and what was said about it. */
  finish(answer) {
    const shown = this.#answers.get(answer);
    if (!shown) return;
    shown.body.end();
    this.#fillFoot(shown, answer);
  }

  /** Notes that old messages had to be left out. */
  showDropped(answer) {
    this.#answers.get(answer)?.node.prepend(droppedNotice(answer.dropped));
  }

  // --- questions ------------------------------------------------------------------------------

  #question(message) {
    const text = element("div", { className: "question-text" }, message.text);
    const node = element("article", { className: "question" }, heading("You wrote"), text);
    const edit = iconButton("edit", "Edit", () => this.#openEditor(node, message, edit));
    node.append(
      element(
        "div",
        { className: "actions" },
        copyButton(() => message.text),
        edit,
      ),
    );
    return node;
  }

  #openEditor(node, message, opener) {
    const area = element("textarea", { value: message.text, "aria-label": "Your message" });
    area.rows = Math.min(12, message.text.split("\n").length + 1);
    const close = () => {
      form.remove();
      node.classList.remove("editing");
      opener.focus();
    };
    const send = () => area.value.trim() && this.#actions.edit(message, area.value);
    const buttons = element(
      "div",
      { className: "editor-foot" },
      element("p", {}, "Later messages are replaced."),
      textButton("Cancel", "quiet", close),
      textButton("Send", "solid", send),
    );
    const form = element("div", { className: "editor" }, area, buttons);
    form.addEventListener("keydown", (event) => onEditorKey(event, { send, close, area }));
    node.classList.add("editing");
    node.append(form);
    area.focus();
  }

  // --- answers --------------------------------------------------------------------------------

  #addAnswer(answer, explain) {
    const text = element("div", { className: "answer-text" });
    const foot = element("div", { className: "answer-foot" });
    const node = element(
      "article",
      { className: "answer" },
      heading("The model wrote"),
      text,
      foot,
    );
    const isExplained = explain && answer.explained;
    if (isExplained) text.setAttribute("role", "group");
    if (isExplained) text.setAttribute("aria-label", "Tokens; arrow keys go from one to the next");
    const shown = { node, foot, isExplained, body: new AnswerBody(text, isExplained) };
    this.#root.append(node);
    this.#answers.set(answer, shown);
    if (answer.dropped) this.showDropped(answer);
    for (const run of runsOf(answer)) shown.body.append(run);
    node.classList.toggle("writing", answer.finish === null);
    if (answer.finish !== null) this.finish(answer);
  }

  #fillFoot({ node, foot, isExplained }, answer) {
    node.classList.remove("writing");
    const again = () => this.#actions.regenerate(answer);
    const actions = element(
      "div",
      { className: "actions" },
      copyButton(() => answerText(answer)),
      iconButton("again", "Regenerate", again),
      answer.usage && element("span", { className: "usage" }, usageOf(answer)),
      isExplained ? legend() : null,
    );
    const problem = answer.finish === "error" ? this.#problem(answer, again) : null;
    foot.replaceChildren(...[problem, remark(answer), actions].filter(Boolean));
  }

  #problem(answer, again) {
    const buttons = [textButton("Try again", "solid", again)];
    if (answer.needsKey) {
      buttons.unshift(textButton("Enter a key", "quiet", () => this.#actions.enterKey()));
    }
    const text = element("p", {}, answer.problem ?? "The answer was interrupted.");
    return element("div", { className: "problem", role: "alert" }, text, ...buttons);
  }
}

function onEditorKey(event, { send, close, area }) {
  if (event.key === "Escape") {
    event.stopPropagation();
    close();
  } else if (event.key === "Enter" && event.target === area && isSendKey(event)) {
    event.preventDefault();
    send();
  }
}

/** Whether Enter sends: not with Shift, and not while an input method composes a character. */
export function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function heading(text) {
  return element("h2", { className: "visually-hidden" }, text);
}

function droppedNotice(count) {
  const what = count === 1 ? "The oldest message" : `The ${count} oldest messages`;
  const text = `${what} no longer fit into one request, and the model does not see them.`;
  return element("p", { className: "remark dropped" }, text);
}

function remark({ finish, parts, maxTokens, usage }) {
  const wasFull = usage && usage.tokens < maxTokens;
  const isEmpty = parts.every((part) => part.text === "");
  let text = null;
  if (finish === "stopped") text = isEmpty ? "Stopped before the first word." : "Stopped.";
  else if (finish === "length" && wasFull) text = "Cut off: the context of the model is full.";
  else if (finish === "length")
    text = `Cut off after ${maxTokens} new tokens, the limit in the settings.`;
  else if (finish === "stop" && isEmpty) text = "The answer is empty.";
  return text && element("p", { className: "remark" }, text);
}

function usageOf({ usage: { tokens, seconds } }) {
  const speed =
    seconds > 0.05 && tokens > 1 ? `, ${((tokens - 1) / seconds).toFixed(0)} a second` : "";
  return `${tokens} ${tokens === 1 ? "token" : "tokens"}${speed}`;
}

function copyButton(text) {
  // Only pages from this machine or over https may write to the clipboard.
  if (!navigator.clipboard) return null;
  const copied = () => showToast("Copied.");
  const failed = () => showToast("The browser did not allow copying.");
  return iconButton("copy", "Copy", () =>
    navigator.clipboard.writeText(text()).then(copied, failed),
  );
}
