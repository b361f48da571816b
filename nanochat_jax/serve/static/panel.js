/** The dialog with the settings. */

import { byId } from "./dom.js";
import { NUMBERS } from "./settings.js";

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
