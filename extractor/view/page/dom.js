// Small helpers for elements, numbers and timing.

/** Return a new element. Attributes named "on..." are listeners, "text" is its text. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "text") made.textContent = value;
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Return a count with its noun: "1 image", "1,234 images". */
export function plural(count, noun, nouns = noun + "s") {
  return `${count.toLocaleString("en-US")} ${count === 1 ? noun : nouns}`;
}

/** Return the last part of a path. */
export function fileName(path) {
  return path.slice(path.lastIndexOf("/") + 1);
}

/** Return a function that waits until calls have stopped for some milliseconds. */
export function debounced(milliseconds, call) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}

/** Say something to screen readers only. */
export function whisper(text) {
  document.getElementById("whisper").textContent = text;
}

/** Say something to screen readers, and show it for a while. */
export function announce(text, isError = false) {
  const toast = document.getElementById("toast");
  toast.textContent = text;
  toast.classList.toggle("error", isError);
  toast.classList.add("shown");
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => toast.classList.remove("shown"), isError ? 8000 : 3000);
}

/** Let the browser save a file. */
export function saveFile(name, blob) {
  const address = URL.createObjectURL(blob);
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
