/** The sampling settings, their limits, and where they are kept. */

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
