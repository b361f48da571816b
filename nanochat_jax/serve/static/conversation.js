/**
 * Conversations as plain data, and what may be done to them.
 *
 * {id, changed, messages}; a message is {role: "user", text} or an answer {role: "assistant",
 * parts, finish, …}. A part is {type: "text" | "python" | "python_output", text}, and in an answer
 * with probabilities, `tokens`: [[text, logprob, [[text, logprob], …]], …], or [text] where the
 * server gave no probability; together they are the text. `finish` is null while the answer is
 * being written, then "stop", "length", "stopped" (by the reader) or "error", with `problem`.
 */

const PART_TYPES = ["text", "python", "python_output"];
const TITLE_LENGTH = 60;

export function newConversation() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
  return { id, changed: Date.now(), messages: [] };
}

/** Adds a question and its answer, which is still empty; returns the answer. */
export function ask(conversation, text, explained) {
  conversation.messages.push({ role: "user", text });
  return beginAnswer(conversation, explained);
}

/** Adds an empty answer after the last question. */
export function beginAnswer(conversation, explained) {
  const answer = { role: "assistant", parts: [], finish: null, explained };
  conversation.messages.push(answer);
  conversation.changed = Date.now();
  return answer;
}

/** Removes `message` and all that follows. */
export function truncateFrom(conversation, message) {
  const index = conversation.messages.indexOf(message);
  if (index >= 0) conversation.messages.length = index;
}

/** Adds a run {type, text, token} to an answer; token is {logprob, alternatives} or undefined. */
export function addRun(answer, { type, text, token }) {
  let part = answer.parts.at(-1);
  if (part?.type !== type) {
    part = { type, text: "" };
    answer.parts.push(part);
  }
  part.text += text;
  if (!answer.explained) return;
  part.tokens ??= [];
  part.tokens.push(token ? [text, token.logprob, token.alternatives] : [text]);
}

/** The runs that an answer was made of, as addRun took them. */
export function* runsOf(answer) {
  for (const { type, text, tokens } of answer.parts) {
    for (const [piece, logprob, alternatives] of tokens ?? [[text]]) {
      const token = logprob === undefined ? undefined : { logprob, alternatives };
      yield { type, text: piece, token };
    }
  }
}

/** What an answer says, without the tools. */
export function answerText(answer) {
  return answer.parts.flatMap((part) => (part.type === "text" ? [part.text] : [])).join("");
}

export function titleOf(conversation) {
  const text = conversation.messages[0]?.text.trim().replace(/\s+/g, " ") ?? "";
  const letters = Array.from(text);
  if (letters.length <= TITLE_LENGTH) return text || "New conversation";
  return letters.slice(0, TITLE_LENGTH).join("") + "…";
}

/**
 * The messages to send: {messages, dropped}, within the server's `limits`. Questions that were
 * never answered are joined with the next, since turns must alternate; the oldest turns are left
 * out. A RangeError says in a sentence that the last question is too long.
 */
export function historyOf(conversation, limits) {
  const longest = Math.min(limits.max_message_chars, limits.max_chars);
  const turns = [];
  for (const message of conversation.messages) {
    const content = message.role === "user" ? message.text : answerContent(message);
    if (content.length === 0) continue;
    const last = turns.at(-1);
    if (last?.role !== message.role) turns.push({ role: message.role, content });
    else last.content = joined(last.content, content, longest);
  }
  const lengths = turns.map(({ content }) => lengthOf(content));
  if (lengths.at(-1) > longest) {
    const [has, most] = [lengths.at(-1), longest].map((number) => number.toLocaleString("en"));
    const advice = `it has ${has} characters, and the server takes at most ${most} characters`;
    throw new RangeError(`Your message is too long: ${advice}.`);
  }
  const fits = (first) =>
    turns.length - first <= limits.max_messages &&
    lengths.slice(first).reduce((sum, length) => sum + length) <= limits.max_chars &&
    turns.every(({ role }, i) => i < first || role !== "user" || lengths[i] <= longest);
  let first = 0;
  while (first + 2 < turns.length && !fits(first)) first += 2;
  return { messages: turns.slice(first), dropped: first };
}

/** Two questions as one, or the later one where both are too long. */
function joined(earlier, later, longest) {
  const both = `${earlier}\n\n${later}`;
  return lengthOf(both) <= longest ? both : later;
}

function answerContent({ parts }) {
  if (parts.every((part) => part.type === "text")) return parts.map((part) => part.text).join("");
  return parts.map(({ type, text }) => ({ type, text }));
}

/** Characters (code points, as the server counts them) of a text, or of the texts of parts. */
export function lengthOf(content) {
  if (typeof content === "string") return Array.from(content).length;
  return content.reduce((sum, part) => sum + lengthOf(part.text), 0);
}

// --- reading what was stored ------------------------------------------------------------------

/** A conversation from storage, or null when what was stored is not one. */
export function readConversation(value) {
  const isOne = typeof value?.id === "string" && Array.isArray(value.messages);
  if (!isOne || value.messages.length === 0 || !value.messages.every(isMessage)) return null;
  if (value.messages[0].role !== "user") return null;
  for (const message of value.messages) {
    if (message.role === "assistant") message.finish ??= "stopped"; // the page closed meanwhile
  }
  return { id: value.id, changed: Number(value.changed) || 0, messages: value.messages };
}

function isMessage(message) {
  if (message?.role === "user") return typeof message.text === "string";
  return (
    message?.role === "assistant" && Array.isArray(message.parts) && message.parts.every(isPart)
  );
}

function isPart(part) {
  if (!PART_TYPES.includes(part?.type) || typeof part.text !== "string") return false;
  return part.tokens === undefined || (Array.isArray(part.tokens) && part.tokens.every(isToken));
}

function isToken(token) {
  if (!Array.isArray(token) || typeof token[0] !== "string") return false;
  return token.length === 1 || (typeof token[1] === "number" && isAlternatives(token[2]));
}

function isAlternatives(list) {
  const isPair = (pair) => typeof pair?.[0] === "string" && typeof pair?.[1] === "number";
  return Array.isArray(list) && list.every(isPair);
}
