/** Keeps the end of the conversation in sight, unless the reader has gone elsewhere. */

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
