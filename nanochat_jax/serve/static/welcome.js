/** What an empty conversation shows: how to begin. */

import { element, textButton } from "./dom.js";

const WELCOME = {
  base: {
    title: "Begin a text",
    text: "The model goes on with it.",
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
