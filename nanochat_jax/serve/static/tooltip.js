/** The probabilities of a token, beside it: by pointer, finger or arrow keys. */

import { byId, element } from "./dom.js";

const GAP = 8; // pixels between a token and its tooltip

export class TokenTooltip {
  #box = byId("tooltip");
  #token = null;

  /** Watches the tokens inside `root`. */
  constructor(root) {
    const showTarget = ({ target }) => this.#show(target.closest?.(".token"));
    root.addEventListener("pointerover", showTarget);
    root.addEventListener("pointerleave", () => this.hide());
    root.addEventListener("focusin", (event) => this.#onFocus(event.target.closest(".token")));
    root.addEventListener("focusout", () => this.hide());
    root.addEventListener("keydown", (event) => this.#onKey(event));
    root.addEventListener("click", ({ target }) => target.closest?.(".token")?.focus());
    addEventListener("scroll", () => this.#onScroll(), { capture: true, passive: true });
  }

  /** Whether there was anything to hide. */
  hide() {
    const wasShown = this.#token !== null;
    this.#token?.removeAttribute("aria-describedby");
    this.#token = null;
    this.#box.hidden = true;
    return wasShown;
  }

  #show(span) {
    if (span === this.#token) return;
    this.hide();
    if (!span) return;
    this.#token = span;
    span.setAttribute("aria-describedby", this.#box.id);
    this.#box.replaceChildren(...contentsOf(span.textContent, span.token));
    this.#box.hidden = false;
    this.#place(span);
  }

  #place(span) {
    const line = span.getClientRects()[0];
    const box = this.#box.getBoundingClientRect();
    const page = document.documentElement;
    const left = Math.min(Math.max(GAP, line.left), page.clientWidth - box.width - GAP);
    const isRoom = line.top - box.height - GAP > 0;
    this.#box.style.left = `${Math.max(GAP, left)}px`;
    this.#box.style.top = `${isRoom ? line.top - box.height - GAP : line.bottom + GAP}px`;
  }

  /** The Tab key returns to the token that had the focus last. */
  #onFocus(span) {
    if (!span) return;
    const last = span.closest(".answer-text").querySelector('.token[tabindex="0"]');
    if (last) last.tabIndex = -1;
    span.tabIndex = 0;
    this.#show(span);
  }

  #onScroll() {
    if (this.#token && this.#token === document.activeElement) this.#place(this.#token);
    else this.hide();
  }

  #onKey(event) {
    const current = event.target.closest(".token");
    if (!current) return;
    const tokens = [...current.closest(".answer-text").querySelectorAll(".token")];
    const index = tokens.indexOf(current);
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tokens.length - 1 };
    if (!(event.key in next)) return;
    event.preventDefault();
    tokens[next[event.key]]?.focus();
  }
}

function contentsOf(text, { logprob, alternatives }) {
  const rows = alternatives.map(([other, otherLogprob]) =>
    row(other, otherLogprob, other === text),
  );
  const isListed = alternatives.some(([other]) => other === text);
  if (!isListed) {
    rows.push(row(text, logprob, true));
    rows.at(-1).classList.add("other");
  }
  return [element("p", {}, "Most likely tokens"), element("ul", {}, ...rows)];
}

function row(text, logprob, isChosen) {
  const probability = Math.exp(logprob);
  const bar = element("span", { className: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--share", probability);
  const chosen = isChosen && element("span", { className: "visually-hidden" }, "chosen: ");
  return element(
    "li",
    { className: isChosen ? "chosen" : "" },
    element("span", { className: "alternative" }, chosen || "", visible(text)),
    element("span", { className: "percent" }, percent(probability)),
    bar,
  );
}

function percent(probability) {
  const value = probability * 100;
  if (value < 0.01) return "< 0.01 %";
  return `${value >= 99.95 ? "100" : value.toPrecision(value < 1 ? 2 : 3)} %`;
}

/** White space and control characters as visible symbols. */
function visible(text) {
  return text
    .replace(/ /g, "␣")
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f\u007f]/g, "·");
}
