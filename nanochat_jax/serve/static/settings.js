/** The sampling settings and where they are kept. */

import { byId } from "./dom.js";
import { readItem, readJSON, removeItem, writeItem } from "./storage.js";

const KEY = "nanochat:settings";
const API_KEY = "nanochat:api-key";

/** The numbers a reader may set; `limit` names the server's limit for them. */
export const NUMBERS = {
  temperature: { label: "Temperature", low: 0, limit: "max_temperature", initial: 0.8 },
  topK: { label: "Top-k", low: 0, limit: "max_top_k", whole: true, initial: 50 },
  maxTokens: {
    label: "The number of new tokens",
    low: 1,
    limit: "max_new_tokens",
    whole: true,
    initial: 512,
  },
};

/** Settings that survive a reload; numbers stay within the server's limits, once they are known. */
export class Settings {
  limits = {};
  #values = {};

  constructor() {
    const stored = readJSON(KEY) ?? {};
    for (const [name, { initial }] of Object.entries(NUMBERS)) {
      this.#values[name] = initial;
      try {
        if (name in stored) this.#values[name] = this.#parse(name, stored[name]);
      } catch {
        // A damaged value counts as none.
      }
    }
    this.#values.explain = stored.explain === true;
  }

  get(name) {
    const value = this.#values[name];
    return name in NUMBERS ? Math.min(value, this.#highest(name)) : value;
  }

  /** Sets a number or the switch `explain`; a RangeError says in a sentence what is allowed. */
  set(name, value) {
    this.#values[name] = name in NUMBERS ? this.#parse(name, value) : value;
    writeItem(KEY, JSON.stringify(this.#values));
  }

  /** What a number may be: "from 0 to 2". */
  rangeOf(name) {
    const highest = this.#highest(name);
    const { low } = NUMBERS[name];
    return highest === Infinity ? `of at least ${low}` : `from ${low} to ${highest}`;
  }

  /** Back to the default numbers. */
  reset() {
    for (const [name, { initial }] of Object.entries(NUMBERS)) {
      this.set(name, Math.min(initial, this.#highest(name)));
    }
  }

  #highest(name) {
    return this.limits[NUMBERS[name].limit] ?? Infinity;
  }

  #parse(name, given) {
    const { label, low, whole } = NUMBERS[name];
    const text = String(given).trim();
    const value = text === "" ? NaN : Number(text.replace(",", "."));
    const isInRange = value >= low && value <= this.#highest(name) && value < Infinity;
    if (isInRange && (!whole || Number.isInteger(value))) return value;
    const kind = whole ? "a whole number" : "a number";
    const shown = text ? `“${text}” is not` : "nothing was given";
    throw new RangeError(`${label} must be ${kind} ${this.rangeOf(name)}; ${shown}.`);
  }

  /** The API key, kept until the tab is closed. */
  get apiKey() {
    return readItem(API_KEY, "sessionStorage") ?? "";
  }

  set apiKey(value) {
    if (value) writeItem(API_KEY, value, "sessionStorage");
    else removeItem(API_KEY, "sessionStorage");
  }
}

// --- the dialog ----------------------------------------------------------------------------------

export class SettingsPanel {
  #dialog = byId("settings");
  #key = byId("api-key");

  /** `onClose(keyChanged)` is called when the dialog closes. */
  constructor(settings, onClose) {
    this.settings = settings;
    for (const name of Object.keys(NUMBERS)) {
      byId(name).addEventListener("change", () => this.#take(name));
    }
    byId("open-settings").addEventListener("click", () => this.open());
    byId("close-settings").addEventListener("click", () => this.#dialog.close());
    byId("reset-settings").addEventListener("click", () => {
      settings.reset();
      this.#fill();
    });
    byId("settings-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const wrong = Object.keys(NUMBERS).find((name) => !this.#take(name));
      if (wrong) byId(wrong).focus();
      else this.#dialog.close();
    });
    // A click on the backdrop is a click on the dialog itself, outside of its contents.
    this.#dialog.addEventListener("click", ({ target }) => {
      if (target === this.#dialog) this.#dialog.close();
    });
    this.#dialog.addEventListener("close", () => onClose(this.#takeKey()));
  }

  /** Opens it, the focus on the field called `id`. */
  open(id = "temperature") {
    this.#fill();
    this.#dialog.showModal();
    byId(id).focus();
  }

  #fill() {
    for (const name of Object.keys(NUMBERS)) {
      byId(name).value = this.settings.get(name);
      byId(`${name}-range`).textContent = this.settings.rangeOf(name);
      this.#showProblem(name, "");
    }
    this.#key.value = this.settings.apiKey;
  }

  /** Whether the field's value could be taken over. */
  #take(name) {
    try {
      this.settings.set(name, byId(name).value);
      this.#showProblem(name, "");
      return true;
    } catch (error) {
      this.#showProblem(name, error.message);
      return false;
    }
  }

  #showProblem(name, problem) {
    byId(`${name}-problem`).textContent = problem;
    byId(name).setAttribute("aria-invalid", String(problem !== ""));
  }

  #takeKey() {
    const key = this.#key.value.trim();
    const isChanged = key !== this.settings.apiKey;
    this.settings.apiKey = key;
    return isChanged;
  }
}
