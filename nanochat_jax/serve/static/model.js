/** Which model the page talks to, and what a reader should know about it. */

import { fetchModel } from "./api.js";
import { byId, element, textButton } from "./dom.js";

const STAGES = { base: "base model", chat: "chat model" };
const BASE_NOTICE =
  "This is a base model: it has not learned to chat, so it does not answer but continues " +
  "the text that you begin.";

export class ServedModel {
  #model = null;

  /** `onKnown(model)` is called when the model is known, `enterKey()` when it needs a key. */
  constructor(settings, { onKnown, enterKey }) {
    Object.assign(this, { settings, onKnown, enterKey });
  }

  get stage() {
    return this.#model?.stage;
  }

  /** The model; asks the server when it is not known. Throws RequestFailed. */
  async known() {
    if (!this.#model) {
      this.#model = await fetchModel(this.settings.apiKey);
      this.settings.limits = this.#model.limits;
      this.#show();
    }
    return this.#model;
  }

  /** The server may have another model, or other limits, by the next question. */
  forget() {
    this.#model = null;
  }

  /** Finds out which model it is, or shows why that cannot be known. */
  async load() {
    this.forget();
    try {
      await this.known();
    } catch (error) {
      this.#showProblem(error);
    }
  }

  #show() {
    const { id, stage, step, context, val_bpb: bitsPerByte } = this.#model;
    byId("model-name").textContent = id;
    byId("model-stage").textContent = STAGES[stage] ?? stage ?? "";
    byId("model-stage").hidden = !stage;
    const facts = [`Step ${step}`, `context of ${context} tokens`];
    if (bitsPerByte) facts.push(`${bitsPerByte.toFixed(3)} bits per byte on unseen text`);
    byId("model").title = facts.join(", ");
    const notice = element("p", { className: "notice stage-notice" }, BASE_NOTICE);
    byId("notices").replaceChildren(...(stage === "base" ? [notice] : []));
    this.onKnown(this.#model);
  }

  #showProblem(error) {
    byId("model-name").textContent = "not connected";
    byId("model-stage").hidden = true;
    const again = textButton("Try again", "solid", () => this.load());
    const key = error.needsKey ? textButton("Enter a key", "quiet", () => this.enterKey()) : "";
    const text = element("p", {}, error.message);
    const notice = element("div", { className: "problem", role: "alert" }, text, key, again);
    byId("notices").replaceChildren(notice);
  }
}

// --- what an empty conversation shows ------------------------------------------------------------

const WELCOME = {
  base: {
    title: "Begin a text",
    text: "The model continues it.",
    examples: ["The capital of France is", "Once upon a time", "The most important rule is"],
  },
  chat: {
    title: "What would you like to know?",
    text: "Small models are often wrong: check what matters.",
    examples: ["Why is the sky blue?", "What is 17 * 23?", "Write a short poem about rain."],
  },
};

/** The greeting for a stage; `choose(text)` is called with an example that was chosen. */
export function welcome(stage, choose) {
  const { title, text, examples } = WELCOME[stage] ?? WELCOME.chat;
  const buttons = examples.map((example) => textButton(example, "example", () => choose(example)));
  return element(
    "div",
    { className: "welcome" },
    element("h2", {}, title),
    element("p", {}, text),
    element("div", { className: "examples" }, ...buttons),
  );
}
