/** Slash commands: what a line that begins with "/" does. */

import { NUMBERS } from "./settings.js";

const HELP = [
  ["/temperature X", "how surprising answers may be, 0 to 2"],
  ["/topk K", "draw among the K likeliest tokens, 0 to 200; 0: all"],
  ["/clear", "begin a new conversation"],
  ["/help", "this list"],
];

const SETTING_OF = { "/temperature": "temperature", "/topk": "topK" };

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
  if (command === "/help") {
    return { done: true, lines: HELP.map(([usage, effect]) => `${usage} — ${effect}`) };
  }
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
