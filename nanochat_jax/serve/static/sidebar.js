/** The list of conversations; on narrow screens a drawer. */

import { titleOf } from "./conversation.js";
import { byId, element, iconButton } from "./dom.js";

const isNarrow = matchMedia("(max-width: 52rem)");

export class Sidebar {
  #list = byId("conversations");
  #side = byId("side");

  /** `actions`: {open(id), remove(id), startNew()}. */
  constructor(actions) {
    this.actions = actions;
    byId("open-side").addEventListener("click", () => this.#setOpen(true));
    byId("close-side").addEventListener("click", () => this.close());
    byId("backdrop").addEventListener("click", () => this.close());
    byId("new-conversation").addEventListener("click", () => {
      this.close();
      actions.startNew();
    });
    isNarrow.addEventListener("change", () => this.#setOpen(false));
    this.#setOpen(false);
  }

  /** Lists the conversations; `writing` are the ids of those that are being answered. */
  show(conversations, currentId, writing) {
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    const items = conversations.map((one) => this.#item(one, one.id === currentId, writing));
    this.#list.replaceChildren(...items);
    if (!focused) return;
    const again = this.#list.querySelector(`[data-id="${CSS.escape(focused)}"] button`);
    (again ?? byId("new-conversation")).focus();
  }

  /** Closes the drawer; whether it was open. */
  close() {
    const wasOpen = this.#side.classList.contains("open");
    this.#setOpen(false);
    if (wasOpen) byId("open-side").focus();
    return wasOpen;
  }

  #item(conversation, isCurrent, writing) {
    const title = titleOf(conversation);
    const open = element("button", { type: "button", className: "open", title }, title);
    open.addEventListener("click", () => {
      this.close();
      this.actions.open(conversation.id);
    });
    if (isCurrent) open.setAttribute("aria-current", "true");
    const remove = iconButton("delete", `Delete “${title}”`, () => {
      this.actions.remove(conversation.id);
    });
    const className = writing.has(conversation.id) ? "writing" : "";
    const item = element("li", { className }, open, remove);
    item.dataset.id = conversation.id;
    return item;
  }

  #setOpen(isOpen) {
    this.#side.classList.toggle("open", isOpen);
    byId("backdrop").hidden = !isOpen;
    byId("page").inert = isOpen;
    // A closed drawer is outside the screen: neither Tab nor a screen reader should get there.
    this.#side.inert = isNarrow.matches && !isOpen;
    byId("open-side").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) byId("close-side").focus();
  }
}
