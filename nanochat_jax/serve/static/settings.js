/** The sampling settings, their limits, and where they are kept. */

import { byId } from "./dom.js";
import { readItem, readJSON, removeItem, writeItem } from "./storage.js";

const KEY = "nanochat:settings";
const API_KEY = "nanochat:api-key";

/** The numbers a reader may set; the limits are the server's. */
export const NUMBERS = {
  temperature: { label: "Temperature", low: 0, high: 2, whole: false, initial: 0.8 },
  topK: { label: "Top-k", low: 0, high: 200, whole: true, initial: 50 },
  maxTokens: { label: "The number of new tokens", low: 1, high: 4096, whole: true, initial: 512 },
};

/** The number that `text` means for a setting; a RangeError says in a sentence what is allowed. */
export function parseNumber(name, text) {
  const { label, low, high, whole } = NUMBERS[name];
  const value = String(text).trim() === "" ? NaN : Number(String(text).trim().replace(",", "."));
  if (!(value >= low && value <= high) || (whole && !Number.isInteger(value))) {
    const kind = whole ? "a whole number" : "a number";
    const shown = String(text).trim() ? `“${String(text).trim()}” is not` : "nothing was given";
    throw new RangeError(`${label} must be ${kind} from ${low} to ${high}; ${shown}.`);
  }
  return value;
}

/** Settings that survive a reload; every change calls the listener. */
export class Settings {
  #values = {};
  #listener;

  constructor(listener = () => {}) {
    this.#listener = listener;
    const stored = readJSON(KEY) ?? {};
    for (const [name, { initial }] of Object.entries(NUMBERS)) {
      this.#values[name] = storedNumber(name, stored[name], initial);
    }
    this.#values.explain = stored.explain === true;
  }

  get(name) {
    return this.#values[name];
  }

  /** Sets a number (given as text or number) or the switch `explain`; throws as parseNumber. */
  set(name, value) {
    this.#values[name] = name in NUMBERS ? parseNumber(name, value) : value;
    writeItem(KEY, JSON.stringify(this.#values));
    this.#listener(name);
  }

  /** The sampling numbers as they were at first. */
  reset() {
    for (const [name, { initial }] of Object.entries(NUMBERS)) this.set(name, initial);
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

function storedNumber(name, value, initial) {
  try {
    return parseNumber(name, value ?? initial);
  } catch {
    return initial;
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
      this.#tell(name, "");
    }
    this.#key.value = this.settings.apiKey;
  }

  /** Whether the field's value could be taken over. */
  #take(name) {
    try {
      this.settings.set(name, byId(name).value);
      this.#tell(name, "");
      return true;
    } catch (error) {
      this.#tell(name, error.message);
      return false;
    }
  }

  #tell(name, problem) {
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
