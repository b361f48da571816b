/** Light or dark: the system's choice, or the reader's. Runs before the page is shown. */

import { readItem, removeItem, writeItem } from "./storage.js";

const KEY = "nanochat:theme";
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

/** "light" or "dark", as the page looks now. */
export function currentTheme() {
  return document.documentElement.dataset.theme ?? (systemIsDark.matches ? "dark" : "light");
}

/** Changes to the other theme; one that equals the system's follows the system again. */
export function toggleTheme() {
  const theme = currentTheme() === "dark" ? "light" : "dark";
  if ((theme === "dark") === systemIsDark.matches) {
    delete document.documentElement.dataset.theme;
    removeItem(KEY);
  } else {
    document.documentElement.dataset.theme = theme;
    writeItem(KEY, theme);
  }
}

/** Calls `listener` when the system's choice changes. */
export function onSystemTheme(listener) {
  systemIsDark.addEventListener("change", listener);
}

const chosen = readItem(KEY);
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
