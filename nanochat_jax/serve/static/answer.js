/**
 * Shows what an answer says while it is being written: text, code between ``` fences, calls of the
 * calculator, and tokens with their probabilities. It only appends; nothing is rendered twice.
 */

import { element, icon } from "./dom.js";

const TOOLS = {
  python: { className: "tool call", label: "Calculator" },
  python_output: { className: "tool result", label: "Result" },
};
// The least probability for each tint, from likely to surprising.
const PROBABILITIES = [0.9, 0.6, 0.3, 0.1, 0.03, 0];

export class AnswerBody {
  #root;
  #explained;
  #type = null;
  #writer = null;

  /** `explained`: tokens are shown as such, and text as it is, without code blocks. */
  constructor(root, explained) {
    this.#root = root;
    this.#explained = explained;
  }

  append({ type, text, token }) {
    if (type !== this.#type) this.#begin(type);
    this.#writer.write(text, token);
  }

  /** Shows what was held back because it could have begun a fence. */
  end() {
    this.#writer?.end();
  }

  #begin(type) {
    this.end();
    this.#type = type;
    const place = type === "text" ? this.#root : this.#toolBox(TOOLS[type]);
    const isFenced = type === "text" && !this.#explained;
    this.#writer = isFenced ? new FencedText(place) : new TokenText(place, this.#explained);
  }

  #toolBox({ className, label }) {
    const code = element("code");
    const sign = className.endsWith("call") ? icon("calculator") : element("span", {}, "=");
    sign.setAttribute("aria-hidden", "true");
    const spoken = element("span", { className: "visually-hidden" }, `${label}: `);
    this.#root.append(element("span", { className, title: label }, sign, spoken, code));
    return code;
  }
}

/** Text; each token has its own span where its probability is known and shown. */
class TokenText {
  constructor(place, explained) {
    this.place = place;
    this.explained = explained;
  }

  write(text, token) {
    if (!this.explained || !token) return appendText(this.place, text);
    const level = PROBABILITIES.findIndex((least) => Math.exp(token.logprob) >= least);
    const span = tinted(level, text);
    span.tabIndex = -1;
    span.token = token;
    // The arrow keys go from token to token; the Tab key stops at one of them.
    if (!this.place.closest(".answer-text").querySelector(".token")) span.tabIndex = 0;
    this.place.append(span);
  }

  end() {}
}

/** What the tints mean. */
export function legend() {
  const tints = PROBABILITIES.map((_, level) => tinted(level, ""));
  return element("span", { className: "legend" }, "likely", ...tints, "surprising");
}

function tinted(level, text) {
  const span = element("span", { className: "token" }, text);
  span.dataset.level = level;
  return span;
}

/** Text in which lines between ``` fences become code blocks. */
class FencedText {
  #place;
  #code = null;
  #line = ""; // held back: the beginning of what may be a fence
  #atLineStart = true;

  constructor(place) {
    this.#place = place;
  }

  write(text) {
    for (const piece of text.split(/(?<=\n)/)) this.#writePiece(piece);
  }

  end() {
    const line = this.#line;
    this.#line = "";
    if (line) this.#writeLine(line);
  }

  #writePiece(piece) {
    if (!this.#atLineStart) {
      this.#show(piece);
    } else {
      this.#line += piece;
      if (mayBeFence(this.#line)) return;
      const line = this.#line;
      this.#line = "";
      this.#writeLine(line);
    }
    this.#atLineStart = piece.endsWith("\n");
  }

  #writeLine(line) {
    if (this.#code && /^```\s*$/.test(line)) {
      this.#code = null;
    } else if (!this.#code && /^```[\w+#.-]*\s*$/.test(line)) {
      this.#code = element("code");
      this.#place.append(element("pre", {}, this.#code));
    } else {
      this.#show(line);
    }
  }

  #show(text) {
    appendText(this.#code ?? this.#place, text);
  }
}

/** Whether an unfinished line may still become a fence. */
function mayBeFence(line) {
  return !line.endsWith("\n") && ("```".startsWith(line) || /^```[\w+#.-]{0,20}[ \r]*$/.test(line));
}

function appendText(place, text) {
  const last = place.lastChild;
  if (last?.nodeType === Node.TEXT_NODE) last.appendData(text);
  else place.append(text);
}
