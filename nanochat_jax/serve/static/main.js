/** Builds the page from its modules. */

import { Chat } from "./chat.js";
import { Composer, runCommand } from "./composer.js";
import { answerText, titleOf } from "./conversation.js";
import { announce, byId, Follower, showToast } from "./dom.js";
import { ServedModel, welcome } from "./model.js";
import { Settings, SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStore } from "./store.js";
import { currentTheme, onSystemTheme, toggleTheme } from "./theme.js";
import { TokenTooltip } from "./tooltip.js";
import { Transcript } from "./transcript.js";

const PLACEHOLDERS = { base: "Begin a text", chat: "Write a message" };
const NOT_KEPT =
  "This browser cannot keep the conversation, because its storage is full or disabled. It will " +
  "be lost when the page is closed; deleting old conversations makes room.";

const settings = new Settings();
const store = new ConversationStore();
const transcript = new Transcript(byId("transcript"), {
  edit: (message, text) => chat.edit(message, text).then(rest),
  regenerate: (answer) => chat.regenerate(answer).then(rest),
  enterKey,
});
const tooltip = new TokenTooltip(byId("transcript"));
const follower = new Follower(byId("main"), byId("to-end"));
const panel = new SettingsPanel(settings, (isKeyChanged) => isKeyChanged && served.load());
const served = new ServedModel(settings, { onKnown: showStage, enterKey });
const chat = new Chat({
  store,
  settings,
  view: { opened, added, run, dropped, began: showWriting, ended, notKept },
  model: () => served.known(),
});
const composer = new Composer({ send, stop: () => chat.stop() });
const sidebar = new Sidebar({ open: (id) => chat.open(id), remove, startNew });

function enterKey() {
  panel.open("api-key");
}

function startNew() {
  chat.startNew();
  rest();
}

/** Focuses the message field, but not on a touch screen, where that opens a keyboard. */
function rest() {
  if (matchMedia("(pointer: fine)").matches) composer.focus();
  else byId("main").focus();
}

/** Takes what was written: a command or a message. Returns whether it was understood. */
function send(text) {
  const outcome = runCommand(text, { settings, startNew });
  if (outcome === null) {
    chat.send(text);
    return true;
  }
  transcript.addNote(outcome.lines);
  announce(outcome.lines.join("\n"));
  follower.toEnd();
  return outcome.done;
}

function remove(id) {
  const conversation = chat.remove(id);
  showList();
  const restore = () => chat.restore(conversation);
  showToast(`“${titleOf(conversation)}” was deleted.`, { label: "Undo", run: restore });
}

// --- what the page shows ------------------------------------------------------------------------

function opened() {
  tooltip.hide();
  transcript.show(chat.current, settings.get("explain"));
  if (chat.current.messages.length === 0) showWelcome();
  showWriting();
  follower.toEnd();
}

function showWelcome() {
  const choose = (text) => {
    composer.text = text;
    composer.focus();
  };
  byId("transcript").replaceChildren(welcome(served.stage, choose));
}

function showStage({ stage }) {
  composer.placeholder = PLACEHOLDERS[stage] ?? PLACEHOLDERS.chat;
  if (chat.current.messages.length === 0) showWelcome();
}

function added(message) {
  document.querySelector(".welcome")?.remove();
  transcript.add(message, settings.get("explain"));
  follower.toEnd();
}

function run(answer, part) {
  transcript.append(answer, part);
  follower.follow();
}

function dropped(answer) {
  transcript.showDropped(answer);
}

function notKept() {
  showToast(NOT_KEPT);
}

function showWriting() {
  composer.isWriting = chat.isWriting;
  byId("main").setAttribute("aria-busy", String(chat.isWriting));
  showList();
}

function ended(conversation, answer) {
  if (answer.finish === "error") served.forget();
  transcript.finish(answer);
  showWriting();
  if (conversation !== chat.current) return;
  follower.follow();
  if (answer.finish !== "error") announce(`The model wrote: ${answerText(answer)}`);
}

function showList() {
  sidebar.show(store.list(), chat.current.id, chat.writing);
  document.title = chat.current.messages.length
    ? `${titleOf(chat.current)} – nanochat`
    : "nanochat";
}

function showExplain() {
  byId("explain").setAttribute("aria-checked", String(settings.get("explain")));
}

function showTheme() {
  const other = currentTheme() === "dark" ? "light" : "dark";
  byId("theme").setAttribute("aria-label", `Use the ${other} theme`);
  byId("theme").title = `Use the ${other} theme`;
}

// --- what the reader does -----------------------------------------------------------------------

byId("explain").addEventListener("click", () => {
  settings.set("explain", !settings.get("explain"));
  showExplain();
  transcript.show(chat.current, settings.get("explain"));
  if (chat.current.messages.length === 0) showWelcome();
  else if (settings.get("explain")) showToast("New answers will show token probabilities.");
});

byId("theme").addEventListener("click", () => {
  toggleTheme();
  showTheme();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || byId("settings").open) return;
  if (!tooltip.hide() && !sidebar.close()) chat.stop();
});

addEventListener("pagehide", () => chat.saveAll());

addEventListener("storage", ({ key }) => {
  const id = store.refresh(key);
  if (id === null) return;
  if (id === chat.current.id && !chat.isWriting && store.get(id)) chat.open(id);
  else showList();
});

onSystemTheme(showTheme);
showTheme();
showExplain();
if (store.list().length) chat.open(store.list()[0].id);
else chat.startNew();
served.load();
rest();
