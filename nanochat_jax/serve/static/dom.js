/** Building elements. Text only ever becomes text: nothing in this page parses HTML. */

/** An element with properties, attributes (names with "-", and "role") and children. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** One of the icons at the top of index.html. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows only an icon; screen readers call it `label`. */
export function iconButton(name, label, onclick) {
  const properties = { type: "button", className: "icon-button", title: label, onclick };
  return element("button", { ...properties, "aria-label": label }, icon(name));
}

/** A button with words. */
export function textButton(label, className, onclick) {
  return element("button", { type: "button", className, onclick }, label);
}

export function byId(id) {
  return document.getElementById(id);
}

/** Has a screen reader say something once it has finished what it says now. */
export function announce(text) {
  byId("announcer").textContent = text;
}

let toastTimer;

/** A passing message at the bottom, with an optional action {label, run}. */
export function showToast(text, action) {
  const toast = byId("toast");
  const hide = () => (toast.hidden = true);
  const act = () => {
    hide();
    action.run();
  };
  toast.hidden = false;
  toast.replaceChildren(text, ...(action ? [textButton(action.label, "quiet", act)] : []));
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, action ? 10_000 : 5_000);
}

// --- scrolling -----------------------------------------------------------------------------------

const NEAR = 48; // pixels from the end that still count as the end

export class Follower {
  #place;
  #button;
  #isAtEnd = true;
  #isPlanned = false;

  constructor(place, button) {
    this.#place = place;
    this.#button = button;
    place.addEventListener("scroll", () => this.#look(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.follow()).observe(place);
  }

  /** To be called when something was appended: scrolls if the end was in sight. */
  follow() {
    if (this.#isPlanned) return;
    this.#isPlanned = true;
    requestAnimationFrame(() => {
      this.#isPlanned = false;
      if (this.#isAtEnd) this.#place.scrollTop = this.#place.scrollHeight;
      else this.#look();
    });
  }

  toEnd() {
    this.#isAtEnd = true;
    this.#place.scrollTop = this.#place.scrollHeight;
    this.#look();
  }

  #look() {
    const { scrollHeight, scrollTop, clientHeight } = this.#place;
    this.#isAtEnd = scrollHeight - scrollTop - clientHeight < NEAR;
    this.#button.hidden = this.#isAtEnd;
  }
}
