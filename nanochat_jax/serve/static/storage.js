/** The browser's storage, which may be forbidden, full or damaged: nothing here throws. */

/** The stored string, or null. */
export function readItem(key, area = "localStorage") {
  try {
    return globalThis[area].getItem(key);
  } catch {
    return null;
  }
}

/** Whether the value was kept. */
export function writeItem(key, value, area = "localStorage") {
  try {
    globalThis[area].setItem(key, value);
    return true;
  } catch {
    return false;
  }
}

export function removeItem(key, area = "localStorage") {
  try {
    globalThis[area].removeItem(key);
  } catch {
    // Storage that cannot be reached holds nothing either.
  }
}

/** The keys that begin with `prefix`. */
export function itemKeys(prefix) {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(prefix));
  } catch {
    return [];
  }
}

/** The stored JSON value, or null where there is none or it is damaged. */
export function readJSON(key) {
  try {
    return JSON.parse(readItem(key));
  } catch {
    return null;
  }
}
